"""A Hugging Face hub with one model for a benchmark; the bytes come from the server that its URLs lead to.

Run as a process of its own: `python -m tests.benchmarks.hub_server DIRECTORY CONTENT_NETWORK`, with a directory of
files that are named by their sha256; it prints its address, and ends with its standard input.
"""

import asyncio
import mmap
import sys
from pathlib import Path

from tests.emulators.hugging_face import hugging_face

REPOSITORY = "bench/model"


async def main(directory: Path, content_network: str) -> None:
    """Serves until standard input ends."""
    async with hugging_face() as hub:
        hub.content_network = content_network
        files = {f"model-{number}.safetensors": _map(path) for number, path in enumerate(sorted(directory.iterdir()))}
        hub.repository(REPOSITORY, files)
        print(hub.endpoint, flush=True)
        await asyncio.to_thread(sys.stdin.read)


def _map(path: Path) -> bytes:
    """Maps a file: the hub reads it once, for its hash."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # type: ignore[return-value]  # all that is asked


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
