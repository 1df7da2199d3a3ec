"""Stands in for the process that forecasts: tells how many of the names that it is given its environment has."""

import json
import os
import sys

if __name__ == "__main__":
    names = json.loads(sys.stdin.readline())["names"].split()
    found = sum(name in os.environ for name in names)  # noqa: TID251 - it is what is looked at
    print(json.dumps({"model_count": found}), flush=True)
