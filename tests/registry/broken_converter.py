"""Stands in for a converter that fails as its source's name says."""

import json
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    match Path(sys.argv[1]).stem:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crashed":
            sys.exit("something went wrong")
        case "garbage":
            print("this is not JSON")
        case "too-big":
            print(json.dumps({"output_bytes": 1 << 60}))
        case "empty":
            pass
