"""Tables and plots of a study's results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any, Final

from tests.simulator.study import KEEP_ALIVE, ORACLE, POLICIES, PREDICTIVE, REACTIVE, RIVALS, SLEEPLESS

Rows = Sequence[Mapping[str, Any]]
_BEGIN: Final = "<!-- python -m tests.simulator --report writes what follows -->"
_END: Final = "<!-- up to here -->"
_COLOURS: Final = {
    SLEEPLESS: "#e6ab02",
    KEEP_ALIVE: "#d95f02",
    REACTIVE: "#7570b3",
    PREDICTIVE: "#1b9e77",
    ORACLE: "#666666",
}


def table(results: Rows) -> str:
    """Returns a table in Markdown: means over seeds, and of how many seeds predictive is better."""
    lines = [
        "| load | policy | cold | of these woken | p50 TTFT | p99 | mean | device-hours | asleep | ratio | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for load in dict.fromkeys(row["load"] for row in results):
        usual = _mean(results, load, REACTIVE, "device_hours")
        for policy in POLICIES:
            rows = _of(results, load, policy)
            if rows:
                hours, asleep = (_mean(results, load, policy, key) for key in ("device_hours", "asleep_hours"))
                cold, woken = (_mean(results, load, policy, key) for key in ("cold_ratio", "woken_ratio"))
                lines.append(
                    f"| {load} | {policy} | {cold:.2%} | {woken / max(cold, 1e-9):.0%}"
                    f" | {1000 * _mean(results, load, policy, 'p50_seconds'):.0f} ms"
                    f" | {_mean(results, load, policy, 'p99_seconds'):.2f} s"
                    f" | {_mean(results, load, policy, 'mean_seconds'):.3f} s"
                    f" | {hours:,.0f} | {asleep:,.0f} | {hours / usual:.3f} | {len(rows)} |"
                )
    return "\n".join([*lines, "", *verdicts(results), ""])


def verdicts(results: Rows) -> list[str]:
    """Returns, by load and rival, in how many seeds predictive costs less and has the lower p99; the worst ratios."""
    lines = [
        "| load | predictive against | cheaper | lower p99 | worst ratio of cost | worst ratio of p99 |",
        "|---|---|---|---|---|---|",
    ]
    for load in dict.fromkeys(row["load"] for row in results):
        ours = {row["seed"]: row for row in _of(results, load, PREDICTIVE)}
        for rival in RIVALS:
            pairs = [(ours[row["seed"]], row) for row in _of(results, load, rival) if row["seed"] in ours]
            if pairs:
                cost, p99 = ([our[key] / their[key] for our, their in pairs] for key in ("device_hours", "p99_seconds"))
                lines.append(
                    f"| {load} | {rival} | {sum(one < 1 for one in cost)} of {len(pairs)}"
                    f" | {sum(one < 1 for one in p99)} of {len(pairs)} | {max(cost):.3f} | {max(p99):.3f} |"
                )
    return lines


def write(results: Rows, directory: Path) -> None:
    """Writes tables into ``REPORT.md``, between its two marks, and plots beside it."""
    page = directory / "REPORT.md"
    before, rest = page.read_text().split(_BEGIN)
    after = rest.split(_END)[1]
    page.write_text(f"{before}{_BEGIN}\n{table(results)}{_END}{after}")
    draw(results, directory)


def read(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads results; loads of another size have another name."""
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [row | {"load": f"{row['load']}, {row['model_count']:,} models"} for row in rows]


def draw(results: Rows, directory: Path) -> None:
    """Writes ``plane.svg`` (cost and p99 of each run) and ``cold.svg`` (cold starts, means over seeds)."""
    # Drawing brings matplotlib, which running does not need.
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "helios"
    from matplotlib import pyplot as plt  # noqa: PLC0415

    loads = list(dict.fromkeys(row["load"] for row in results))
    columns = min(2, len(loads))
    figure, axes = plt.subplots(-(-len(loads) // columns), columns, squeeze=False, figsize=(9, 3.2 * len(loads) / 2))
    for load, axis in zip(loads, axes.flat, strict=False):
        for policy in (*RIVALS, PREDICTIVE):
            rows = _of(results, load, policy)
            axis.scatter(
                [row["device_hours"] for row in rows], [row["p99_seconds"] for row in rows],
                s=14, label=policy, color=_COLOURS[policy],
            )  # fmt: skip
        axis.axvline(
            _mean(results, load, ORACLE, "device_hours"), color=_COLOURS[ORACLE], ls=":", label="oracle's cost"
        )
        axis.set(title=load, xlabel="device-hours", ylabel="p99 TTFT, s", xlim=(0, None))
        axis.set_ylim(0, 1.1 * max(row["p99_seconds"] for row in _of_load(results, load)))
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(directory / "plane.svg", metadata={"Date": None})
    figure, axis = plt.subplots(figsize=(9, 3.2))
    # What sleeps changes what a cold start costs, not how many there are.
    for place, policy in enumerate((KEEP_ALIVE, REACTIVE, PREDICTIVE)):
        heights = [100 * _mean(results, load, policy, "cold_ratio") for load in loads]
        axis.bar([at + 0.27 * (place - 1) for at in range(len(loads))], heights, 0.25, label=policy,
                 color=_COLOURS[policy])  # fmt: skip
    axis.set_xticks(range(len(loads)), [fill(load, 13) for load in loads], fontsize=6)
    axis.set_ylabel("cold starts, % of requests")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(directory / "cold.svg", metadata={"Date": None})


def _of_load(results: Rows, load: str) -> list[Mapping[str, Any]]:
    return [row for row in results if row["load"] == load]


def _of(results: Rows, load: str, policy: str) -> list[Mapping[str, Any]]:
    return [row for row in results if row["load"] == load and row["policy"] == policy]


def _mean(results: Rows, load: str, policy: str, key: str) -> float:
    return mean(float(row[key]) for row in _of(results, load, policy))
