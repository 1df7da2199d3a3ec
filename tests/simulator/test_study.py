"""What the study says, in a small form by default and in its whole size under `soak`; and that it can be trusted."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from helios.proxy.sizing import replica_size
from tests.simulator.fleet import Fleet
from tests.simulator.loads import HOUR, Load, Span, bursty, replay, seasonal, traces
from tests.simulator.oracle import oracle
from tests.simulator.report import read, table, write
from tests.simulator.study import (
    FULL,
    JUDGING_SEEDS,
    KEEP_ALIVE,
    ORACLE,
    POLICIES,
    PREDICTIVE,
    REACTIVE,
    RIVALS,
    SHORT,
    SLEEPLESS,
    TUNING_SEEDS,
    Result,
    Size,
    cases,
    policy_of,
    run,
)
from tests.simulator.world import Hardware, Tier, models

Maker = Callable[[int, float, Span, int], Load]
SPAN = Span(48, 1, 3)


def study(size: Size, seeds: tuple[int, ...]) -> dict[tuple[str, str], list[Result]]:
    found: dict[tuple[str, str], list[Result]] = {}
    for seed in seeds:
        for case in cases(size, None):
            for result in run(case, seed):
                found.setdefault((case.name, result.policy), []).append(result)
    return found


def test_predictive_costs_less_and_answers_sooner_in_the_small_form() -> None:
    results = study(SHORT, TUNING_SEEDS[:1])

    def of(load: str, policy: str, key: str) -> float:
        return mean(float(getattr(result, key)) for result in results[load, policy])

    for rival in RIVALS:
        assert of("seasonal", PREDICTIVE, "device_hours") < of("seasonal", rival, "device_hours"), rival
        assert of("seasonal", PREDICTIVE, "p99_seconds") < of("seasonal", rival, "p99_seconds"), rival
    assert of("bursty", PREDICTIVE, "device_hours") <= 1.05 * of("bursty", REACTIVE, "device_hours")
    for load in ("seasonal", "bursty"):
        for policy in (*RIVALS, PREDICTIVE):
            assert of(load, ORACLE, "device_hours") < of(load, policy, "device_hours")
            assert of(load, ORACLE, "p99_seconds") < of(load, policy, "p99_seconds")
    told = table([result.as_json() for rows in results.values() for result in rows])
    assert all(f"| seasonal | {policy} |" in told for policy in POLICIES)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_predictive_costs_less_and_answers_sooner_for_each_seed_at_full_size() -> None:
    results = study(FULL, JUDGING_SEEDS)
    for rival in RIVALS:
        for ours, theirs in zip(results["seasonal", PREDICTIVE], results["seasonal", rival], strict=True):
            assert ours.device_hours < theirs.device_hours, (rival, ours.seed)
            assert ours.p99_seconds < theirs.p99_seconds, (rival, ours.seed)
    for ours, theirs in zip(results["bursty", PREDICTIVE], results["bursty", REACTIVE], strict=True):
        assert ours.device_hours <= 1.05 * theirs.device_hours, ours.seed


@pytest.mark.parametrize("make", [seasonal, bursty])
def test_a_run_is_the_same_each_time_and_no_policy_beats_who_knows_all(make: Maker) -> None:
    hardware = Hardware()
    population = models(30, hardware)
    loads = [make(30, 0.05, SPAN, 7) for _ in range(2)]
    assert loads[0].times == loads[1].times
    assert make(30, 0.05, SPAN, 8).times != loads[0].times
    policy = policy_of(REACTIVE)
    outcomes = [
        Fleet(policy, hardware, population, load, node_count=4, keeps_decisions=True).run() for load in loads
    ]  # fmt: skip
    assert outcomes[0] == outcomes[1]
    needed = [replica_size(m.entry, policy.lifecycle.sizing, is_gpu=True).memory_bytes for m in population]
    first, device_seconds = oracle(hardware, population, needed, loads[0])
    assert 0 < device_seconds < outcomes[0].device_seconds
    answered = np.array(outcomes[0].first_token_seconds)
    assert len(first) == len(answered)
    assert np.nanmin(answered - first) > -1e-9, "nobody is faster than who never waits"


def test_nodes_never_have_more_than_they_have_and_everything_is_answered_where_room_is_short() -> None:
    # Two nodes for sixty models: replicas give way to those that somebody waits for.
    hardware = Hardware()
    population = models(60, hardware)
    load = seasonal(60, 0.05, SPAN, seed=1)
    fleet = Fleet(policy_of(KEEP_ALIVE), hardware, population, load, node_count=2)
    outcome = fleet.run()
    assert outcome.device_seconds <= 2 * SPAN.judged_hours * HOUR
    assert fleet.least_free_bytes >= 0
    assert np.isnan(outcome.first_token_seconds).sum() <= 5, "but for those that wait when the study ends"


@pytest.mark.leaks("matplotlib keeps the fonts that it has read open")
def test_a_report_has_tables_between_its_marks_and_plots_beside_it(tmp_path: Path) -> None:
    small = Size(30, 4, 0.05, SPAN)
    results = [result for seed in (1, 2) for case in cases(small, None) for result in run(case, seed)]
    file, page = tmp_path / "results.jsonl", tmp_path / "REPORT.md"
    file.write_text("".join(json.dumps(result.as_json()) + "\n" for result in results))
    page.write_text(
        "before\n<!-- python -m tests.simulator --report writes what follows -->\nstale\n<!-- up to here -->after"
    )
    write(read([file]), tmp_path)
    told = page.read_text()
    assert told.startswith("before\n")
    assert told.endswith("-->after")
    assert "stale" not in told
    assert "| seasonal, 30 models | predictive |" in told
    assert "| bursty, 30 models | reactive |" in told
    for plot in ("plane.svg", "cold.svg"):
        assert "</svg>" in (tmp_path / plot).read_text()


def test_loads_have_the_rate_and_the_history_that_they_claim() -> None:
    for make in (seasonal, bursty):
        load = make(500, 1.0, Span(48, 0, 24), seed=3)
        assert load.times == sorted(load.times)
        assert load.hours.sum() / (72 * HOUR) == pytest.approx(1.0, rel=0.05)
        assert load.hours[:, 48:].sum() == len(load.times)
        assert np.bincount(load.models, minlength=500).tolist() == load.hours[:, 48:].sum(axis=1).tolist()
    by_hour = seasonal(500, 1.0, Span(48, 0, 24), seed=3).hours
    top = by_hour[0].reshape(3, 24).sum(axis=0)
    assert top.max() > 10 * max(1.0, top.min()), "a model has its day and its night"


def test_traces_are_halved_and_stretched_over_all_hours(tmp_path: Path) -> None:
    rows = [f"2023-11-16 18:{15 + second // 60:02}:{second % 60:02}.5000000,{second + 1},7" for second in range(1200)]
    (tmp_path / "azure-llm-2023-code.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    lines = [f'{{"timestamp": {3000 * tick}, "input_length": {tick + 1}, "output_length": 3}}' for tick in range(400)]
    (tmp_path / "mooncake-conversation.jsonl").write_text("\n".join(lines))
    early, late = traces(tmp_path, half=0), traces(tmp_path, half=1)
    for one, other, count in zip(early, late, (1200, 400), strict=True):
        assert len(one.times) + len(other.times) == count
        assert one.prompt_tokens.max() < other.prompt_tokens.min(), "no request judges that was tuned on"
    load = replay(late[0], 40, SPAN, 1, has_rhythm=False)
    assert load.hours.sum() == 2 * len(late[0].times)
    thinned = replay(late[0], 40, SPAN, 1, has_rhythm=True)
    assert 0 < thinned.hours.sum() < load.hours.sum()


def test_a_start_takes_the_longer_the_farther_its_weights_are() -> None:
    hardware = Hardware()
    seconds = [hardware.started_after(tier, 16 << 30) for tier in Tier]
    assert seconds == sorted(seconds)
    assert seconds[0] > hardware.start_seconds
    assert hardware.awake_after(Tier.MEMORY, 16 << 30) < seconds[0], "waking is for that"


def test_a_sleeper_costs_what_it_leaves_on_the_device_and_waking_costs_less_time_than_a_start() -> None:
    hardware = Hardware()
    population = models(30, hardware)
    load = seasonal(30, 0.05, SPAN, seed=7)
    bare, sleeping = (
        Fleet(policy_of(name), hardware, population, load, node_count=8).run() for name in (SLEEPLESS, KEEP_ALIVE)
    )
    assert bare.wake_count == bare.asleep_seconds == 0
    assert sleeping.wake_count > 0
    assert sum(sleeping.starts.values()) < sum(bare.starts.values())
    extra = sleeping.device_seconds - bare.device_seconds
    # Until it sleeps, and while it wakes, it books all.
    assert 0 < extra == pytest.approx(sleeping.asleep_seconds, rel=0.2)
    waits = [np.nanmean(np.array(run.first_token_seconds)) for run in (sleeping, bare)]
    assert waits[0] < waits[1]
