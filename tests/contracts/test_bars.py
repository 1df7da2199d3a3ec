"""The judge of the benchmarks: what passes, what fails, what is an error."""

import tomllib
from typing import Any

import pytest

from proto.generate import ROOT
from tests.benchmarks.judgement import Bar, judge, missing

FAST = Bar(name="edge.latency", what="", unit="ms", bar=1.0, direction="at_most")
MUCH = Bar(name="worker.tokens", what="", unit="ratio", bar=0.97, direction="at_least")
LATER = Bar(name="storage.copied", what="", unit="bytes", bar=0.0, later="an issue")


def result(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "baseline": None, "samples": 3}


@pytest.mark.parametrize(
    ("name", "value", "unit", "ok"),
    [
        ("edge.latency", 1.0, "ms", True),
        ("edge.latency", 1.01, "ms", False),
        ("worker.tokens", 0.97, "ratio", True),
        ("worker.tokens", 0.96, "ratio", False),
        ("edge.latency", float("nan"), "ms", False),
    ],
)
def test_result_is_ok_on_the_good_side_of_its_bar(name: str, value: float, unit: str, ok: bool) -> None:
    (line,) = judge([result(name, value, unit)], [FAST, MUCH])
    assert line.ok is ok
    assert line.as_json().keys() == {"name", "value", "unit", "baseline", "samples", "bar", "ok"}


@pytest.mark.parametrize(
    "results",
    [
        [result("edge.unheard_of", 1.0, "ms")],
        [result("edge.latency", 1.0, "s")],
        [result("edge.latency", 1.0, "ms"), result("edge.latency", 2.0, "ms")],
    ],
)
def test_result_that_fits_no_bar_is_an_error(results: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"edge\."):
        judge(results, [FAST])


def test_bar_that_nothing_measured_is_named_unless_it_is_for_later() -> None:
    assert missing([result("edge.latency", 1.0, "ms")], [FAST, MUCH, LATER]) == [MUCH]


def test_committed_bars_are_well_formed() -> None:
    bars = [Bar(**entry) for entry in tomllib.loads((ROOT / "tests/benchmarks/bars.toml").read_text())["bar"]]
    assert len({bar.name for bar in bars}) == len(bars)
    assert {bar.name.partition(".")[0] for bar in bars} == {"edge", "worker", "storage", "registry", "proxy"}
