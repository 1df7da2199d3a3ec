"""The scalable driver decides what the core decides, at the same second, for the same node."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from helios.proxy.scaling.forecast import WarmPoolMode
from helios.registry.usage.targets import Rung, TargetPolicy
from tests.simulator.core_driver import CoreRun
from tests.simulator.expected import expected_targets
from tests.simulator.fleet import Fleet
from tests.simulator.loads import Load, Span, bursty, seasonal
from tests.simulator.outcome import Decision
from tests.simulator.study import PREDICTIVE, REACTIVE, policy_of
from tests.simulator.world import Hardware, models

Maker = Callable[[int, float, Span, int], Load]
SPAN = Span(history_hours=72, warm_up_hours=0, judged_hours=3)
MODELS = 12
NODES = 3


def in_order(decisions: list[Decision]) -> list[Decision]:
    """What is decided in the same second has no order that matters."""
    return sorted(decisions, key=lambda decision: (decision.at, decision.what, decision.model, decision.node))


def with_burst(load: Load) -> Load:
    """The same, with more requests for one model at once than a replica should have, long ones, one every 2.5 s."""
    times = load.times + [600.01 + 2.5 * index for index in range(90)]
    order = np.argsort(times, kind="stable").tolist()
    more = ([5] * 90, [300] * 90, [30_000] * 90)
    lists = zip((load.models, load.prompt_tokens, load.completion_tokens), more, strict=True)
    chosen, prompts, completions = ([(had + new)[index] for index in order] for had, new in lists)
    return replace(
        load, times=[times[index] for index in order], models=chosen, prompt_tokens=prompts,
        completion_tokens=completions,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "make"), [(REACTIVE, bursty), (PREDICTIVE, seasonal)])
def test_the_driver_for_large_fleets_decides_what_the_core_decides(name: str, make: Maker) -> None:
    hardware = Hardware()
    population = models(MODELS, hardware)
    load = with_burst(make(MODELS, 0.03, SPAN, 4))
    policy = policy_of(name)
    is_followed = policy.lifecycle.warm_pool is WarmPoolMode.ON
    targets = expected_targets(load, population, [TargetPolicy(memory_ratio=0.1)])[0] if is_followed else None
    fleet = Fleet(
        policy, hardware, population, load, node_count=NODES, targets=targets, is_settled=False, keeps_decisions=True
    )
    outcome = fleet.run()
    core = CoreRun(policy, hardware, population, load, node_count=NODES, targets=targets)
    core.run()
    assert in_order(outcome.decisions) == in_order(core.decisions)
    assert sum(decision.what == "start" for decision in core.decisions) >= 5
    assert {"drain", "stage"} <= {decision.what for decision in core.decisions}
    assert len({decision.node for decision in core.decisions if decision.model == "model-00005"}) > 1, "it scaled"
    if targets is not None:
        ready = [{target.model for target in hour if target.rung is Rung.READY} for hour in targets]
        assert ready[0] - ready[1], "targets go"
        assert ready[2] - ready[1], "targets come"
    told = np.array([core.first_token_seconds.get(index, np.nan) for index in range(len(load.times))])
    # Requests beyond what an engine should have waiting are held by the core and lined up at an engine here.
    assert np.nanpercentile(outcome.first_token_seconds, 99) == pytest.approx(np.nanpercentile(told, 99), rel=0.1)
    assert np.isnan(outcome.first_token_seconds).sum() == np.isnan(told).sum()
