"""Replicas on one node share one copy of the weights: they map the same pages."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from tests.storage.harness import Mesh

# Opens the file with the stock library, reads every byte, says so, and waits.
REPLICA = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], framework="numpy") as weights:
    tensor = weights.get_slice("w")
    import mmap
    with open(sys.argv[1], "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        total = sum(mapped[offset] for offset in range(0, len(mapped), 4096))
        print(tensor.get_shape(), total, flush=True)
        sys.stdin.read()
"""


def memory_of(pid: int, inode: int) -> tuple[int, int]:
    """Rss and Pss, in KiB, of the process's mappings of one file."""
    rss = pss = 0
    is_ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = line.split()[4] == str(inode)
        elif is_ours and line.startswith("Rss:"):
            rss += int(line.split()[1])
        elif is_ours and line.startswith("Pss:"):
            pss += int(line.split()[1])
    return rss, pss


async def test_two_processes_share_the_pages_of_a_materialised_file(mesh: Mesh) -> None:
    weights = np.arange(4 << 20, dtype=np.float32)
    revision = mesh.shelf.add({"model.safetensors": save({"w": weights})})
    async with mesh.agent() as agent, agent.client.materialize(revision, holder="t") as lent:
        path = Path(lent.path) / "model.safetensors"
        command = [sys.executable, "-c", REPLICA, str(path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        replicas = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]  # noqa: ASYNC220
        try:
            said = {replica.stdout.readline() for replica in replicas if replica.stdout is not None}
            assert len(said) == 1
            assert said.pop().startswith(b"[4194304]")
            for replica in replicas:
                rss, pss = memory_of(replica.pid, path.stat().st_ino)
                assert rss >= 16 << 10
                assert pss < 0.6 * rss
        finally:
            for replica in replicas:
                replica.communicate(timeout=20)
