"""Compares results with bars. Pure: knows neither files nor benchmarks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

COMPONENTS = ("edge", "worker", "storage", "registry", "proxy")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a result has to reach; an entry of bars.toml."""

    name: str
    what: str
    unit: str
    # None: reported, not judged.
    bar: float | None = None
    direction: Literal["at_most", "at_least"] = "at_most"
    # What the measurement waits for; empty: it has to be there.
    later: str = ""

    def __post_init__(self) -> None:
        if self.name.partition(".")[0] not in COMPONENTS or self.direction not in ("at_most", "at_least"):
            raise ValueError(f"bad bar: {self}")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A result beside its bar."""

    name: str
    value: float
    unit: str
    # What it was compared with, in the benchmark's own unit; None where nothing was.
    baseline: float | None
    # How many measurements the value stands for.
    samples: int
    bar: float | None
    direction: str
    ok: bool

    def as_json(self) -> dict[str, Any]:
        """The form of build/bench.json."""
        return {key: value for key, value in asdict(self).items() if key != "direction"}


def judge(results: Sequence[Mapping[str, Any]], bars: Iterable[Bar]) -> list[Judged]:
    """Puts every result beside its bar.

    Raises:
        ValueError: a result without an entry among the bars, with another unit, or measured twice.
    """
    known = {bar.name: bar for bar in bars}
    judged: dict[str, Judged] = {}
    for result in results:
        name, unit, value = result["name"], result["unit"], float(result["value"])
        bar = known.get(name)
        if bar is None:
            raise ValueError(f"{name} has no entry in bars.toml")
        if unit != bar.unit:
            raise ValueError(f"{name} is measured in {unit!r}, its bar is in {bar.unit!r}")
        if name in judged:
            raise ValueError(f"{name} was measured twice")
        ok = bar.bar is None or (value <= bar.bar if bar.direction == "at_most" else value >= bar.bar)
        baseline = None if result["baseline"] is None else float(result["baseline"])
        samples = int(result["samples"])
        judged[name] = Judged(
            name=name,
            value=value,
            unit=unit,
            baseline=baseline,
            samples=samples,
            bar=bar.bar,
            direction=bar.direction,
            ok=ok,
        )
    return list(judged.values())


def missing(results: Iterable[Mapping[str, Any]], bars: Iterable[Bar]) -> list[Bar]:
    """Returns the bars that had to be measured and were not."""
    measured = {result["name"] for result in results}
    return [bar for bar in bars if bar.name not in measured and not bar.later and bar.bar is not None]
