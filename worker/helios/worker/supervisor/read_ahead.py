"""Reading a checkpoint while the replica that will load it is forked and configured.

A loader that maps its files reads them by page faults, a few pages at a time, one after the other; where the disk was
not read lately that is a quarter of what it gives. The supervisor has threads and half a second before the engine gets
there, so it reads what the start will read, and the loader finds it in the page cache.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import psutil
import structlog

from helios.worker.replica.packed_weights import find_proven
from helios.worker.supervisor.resident_files import read_in

log = structlog.get_logger()

_READING_ENGINES: Final = ("vllm", "transformers")
_CHECKPOINT: Final = "*.safetensors"


async def read_ahead(engine: str, model_path: str, revision: str, packed_weights_directory: str) -> None:
    """Reads the checkpoint that a start will load; nothing where it loads none, or where memory can't hold it.

    Packed weights are read by whoever maps them. Best effort: what can't be read, the start says itself. A cancel ends
    it within some tens of milliseconds.
    """
    if engine.partition(":")[0] not in _READING_ENGINES:
        return
    stop = threading.Event()
    # Of its own: the loop's threads, which the ends of replicas wait for, must not wait for a disk.
    pool = ThreadPoolExecutor(1, thread_name_prefix="read checkpoint")
    try:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(pool, _read, Path(model_path), revision, packed_weights_directory, stop)
    except OSError as error:
        log.warning("weights not read ahead", revision=revision, error=str(error))
    finally:
        stop.set()
        pool.shutdown(wait=False)


def _read(directory: Path, revision: str, packed_root: str, stop: threading.Event) -> None:
    if packed_root and find_proven(Path(packed_root), revision) is not None:
        return
    paths = sorted(path for path in directory.rglob(_CHECKPOINT) if path.is_file())
    # Beyond that, the first pages would be gone before the loader comes to them, and those of others with them.
    if sum(path.stat().st_size for path in paths) < psutil.virtual_memory().available:
        read_in(paths, stop)
