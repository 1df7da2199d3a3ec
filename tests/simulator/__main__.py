"""``python -m tests.simulator``: runs the study, writes results as they come, one JSON object a line; draws them.

`python -m tests.simulator --traces DIRECTORY` is the whole study (some 20 minutes of one quiet core); `--size short`
takes a minute. A run that was stopped goes on with what its file lacks. `--report` draws what files have and runs
nothing.
"""

import argparse
import json
from pathlib import Path

from tests.simulator.report import read, write
from tests.simulator.study import FULL, JUDGING_SEEDS, MEDIUM, POLICIES, SHORT, cases, run

_HERE = Path(__file__).resolve().parent


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--size", choices=("short", "medium", "full"), default="full", help="400, 2,000, 10,000 models")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(JUDGING_SEEDS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--loads", nargs="+", help="beginnings of names of loads; none: all")
    parser.add_argument("--traces", type=Path, help="directory with the real traces; none: without them")
    parser.add_argument("--half", type=int, choices=(0, 1), default=1, help="of each trace: 0 was tuned on, 1 judges")
    parser.add_argument("--output", type=Path, default=Path("build/simulator.jsonl"))
    parser.add_argument(
        "--report", type=Path, nargs="+", help="files with results: writes REPORT.md's tables and plots"
    )
    asked = parser.parse_args()
    if asked.report:
        write(read(asked.report), _HERE)
        return
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.touch()
    done = {(row["load"], row["seed"], row["policy"]) for row in map(json.loads, asked.output.read_text().splitlines())}
    size = {"short": SHORT, "medium": MEDIUM, "full": FULL}[asked.size]
    for seed in asked.seeds:
        for case in cases(size, asked.traces, half=asked.half):
            policies = [name for name in asked.policies if (case.name, seed, name) not in done]
            if not policies or (asked.loads and not case.name.startswith(tuple(asked.loads))):
                continue
            for result in run(case, seed, policies):
                with asked.output.open("a") as lines:
                    lines.write(json.dumps(result.as_json()) + "\n")
                print(result)


if __name__ == "__main__":
    main()
