"""A process that fetches one URL: `python -m tests.mesh.transfer.fetching URL TARGET SIZE SHA256 [usual]`.

With `usual`, by the usual options and as fast as it can; it then says how much memory it had at most.
"""

import sys
from pathlib import Path

from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.gate import DownloadGate
from helios.mesh.transfer.http import HttpSource
from helios.mesh.transfer.order import Transfer, TransferOptions, Wanted

CHUNK_BYTES = 64 << 10
BYTES_PER_SECOND = 8 << 20
"""Slow enough that a kill hits the middle."""

if __name__ == "__main__":
    url, target, size, sha256 = sys.argv[1:5]
    if sys.argv[5:] == ["usual"]:
        downloader = Downloader(TransferOptions(), DownloadGate())
    else:
        options = TransferOptions(chunk_bytes=CHUNK_BYTES, in_flight=4, sync_bytes=4 * CHUNK_BYTES)
        downloader = Downloader(options, DownloadGate(bytes_per_second=BYTES_PER_SECOND))
    print("begun", flush=True)
    result = downloader.fetch(Transfer(HttpSource(url), Path(target), Wanted(int(size), sha256)))
    print(f"resumed {result.resumed_bytes}", flush=True)
    if sys.argv[5:]:
        # Unlike ru_maxrss, it begins anew with the program.
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(f"peak {int(peak.split()[1]) * 1024}", flush=True)
