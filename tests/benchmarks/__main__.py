"""Runs every benchmark and compares it with its bar (`make bench`).

A benchmark is a module `tests/benchmarks/<name>_bench.py` whose `run()` gives dicts with `name`, `value`, `unit`,
`baseline` and `samples`, one by one or as a list, or is a coroutine that returns a list. build/bench.json gets each at
once, with `bar` and `ok` added: what was measured is not lost when a later one fails.
`make bench ARGS="registry proxy"` runs only those modules. The exit status is 1 if a bar is missed.
"""

import argparse
import asyncio
import importlib
import inspect
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from tests.benchmarks.judgement import Bar, Judged, judge, missing

DIRECTORY = Path(__file__).resolve().parent
REPORT = DIRECTORY.parent.parent / "build" / "bench.json"


def main() -> int:
    """Runs the benchmarks that are asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("only", nargs="*", help="names of modules, without _bench; none: all")
    only = set(parser.parse_args().only)
    bars = [Bar(**entry) for entry in tomllib.loads((DIRECTORY / "bars.toml").read_text())["bar"]]
    modules = {path.stem.removesuffix("_bench"): path.stem for path in sorted(DIRECTORY.glob("*_bench.py"))}
    if unknown := only - modules.keys():
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(modules)}")
    console = Console()
    REPORT.parent.mkdir(exist_ok=True)
    results: list[Mapping[str, Any]] = []
    judged: list[Judged] = []
    for name, module in modules.items():
        if not only or name in only:
            console.print(f"running {name} …")
            for result in run(module):
                results.append(result)
                judged = judge(results, bars)
                REPORT.write_text(json.dumps([line.as_json() for line in judged], indent=2) + "\n")
    console.print(table(judged))
    absent = [] if only else missing(results, bars)
    for bar in absent:
        console.print(f"[red]not measured: {bar.name} ({bar.what})")
    return 0 if all(line.ok for line in judged) and not absent else 1


def run(module: str) -> Iterable[Mapping[str, Any]]:
    """Imports a benchmark and runs it; where its results come one by one, it runs while they are taken."""
    results = importlib.import_module(f"tests.benchmarks.{module}").run()
    return asyncio.run(results) if inspect.iscoroutine(results) else results


def table(lines: Iterable[Judged]) -> Table:
    """Shows results, a line each."""
    shown = Table(Column("benchmark", overflow="fold"), "value", "unit", "bar", "baseline", "samples", "")
    for line in lines:
        bar = "" if line.bar is None else f"{'≤' if line.direction == 'at_most' else '≥'} {line.bar:g}"
        mark = "[green]ok" if line.ok else "[red]missed"
        value, baseline = f"{line.value:.4g}", "" if line.baseline is None else f"{line.baseline:.4g}"
        shown.add_row(line.name, value, line.unit, bar, baseline, str(line.samples), mark)
    return shown


if __name__ == "__main__":
    sys.exit(main())
