"""Stands in for the converter: starts a child, then works for ever."""

import json
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    (target / "half").write_bytes(b"x" * 1000)
    source.with_suffix(".pids").write_text(json.dumps([child.pid, child.pid]))
    print(json.dumps({"output_bytes": 1000}), flush=True)
    time.sleep(600)
