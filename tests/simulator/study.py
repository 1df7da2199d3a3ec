"""The study: policies side by side, over loads and seeds that were fixed beforehand.

Constants of policies (`TargetPolicy`, forecasts' bounds, how long replicas sleep) were chosen on `TUNING_SEEDS` with
2,000 models (200 of the dense load) and on the first halves of the traces; `JUDGING_SEEDS` and the second halves judge.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from helios.proxy.core import CorePolicy
from helios.proxy.scaling.forecast import WarmPoolMode
from helios.proxy.settings import ProxySettings
from helios.proxy.sizing import replica_size
from helios.registry.usage.settings import UsageSettings
from tests.simulator.expected import expected_targets
from tests.simulator.fleet import Fleet
from tests.simulator.loads import Floats, Load, Span, Trace, bursty, replay, seasonal, traces
from tests.simulator.oracle import oracle
from tests.simulator.world import Hardware, models

TUNING_SEEDS: Final = (1, 2, 3)
JUDGING_SEEDS: Final = tuple(range(101, 111))
SLEEPLESS, KEEP_ALIVE, REACTIVE = "keep-alive, no sleep", "keep-alive 10 min", "reactive"
PREDICTIVE, ORACLE = "predictive", "oracle"
RIVALS: Final = (SLEEPLESS, KEEP_ALIVE, REACTIVE)
POLICIES: Final = (*RIVALS, PREDICTIVE, ORACLE)
_KEEP_ALIVE_SECONDS: Final = 600.0
# A trace has some five thousand requests, each of which stands for one in each group of twenty models.
_REPLAYED_MODELS: Final = 400
_REPLAYED_NODES: Final = 40
_REPLAYED_SPAN: Final = Span(72, 2, 24)


@dataclass(frozen=True, slots=True)
class Size:
    """How large a study is; ``requests_per_second`` of all models, on the mean."""

    models: int
    nodes: int
    requests_per_second: float
    span: Span


FULL: Final = Size(10_000, 1_000, 5.0, Span(96, 2, 24))
MEDIUM: Final = Size(2_000, 200, 1.0, Span(96, 2, 24))
SHORT: Final = Size(400, 40, 0.2, Span(72, 2, 24))
# Three times the requests for each model.
DENSE: Final = Size(400, 40, 0.6, Span(96, 2, 24))


@dataclass(frozen=True, slots=True)
class Result:
    """One policy on one load; seconds to the first token are of requests that had an answer.

    `unanswered`: refused, or still waiting when the study ended.
    """

    load: str
    seed: int
    policy: str
    model_count: int
    requests: int
    unanswered: int
    cold_ratio: float
    p50_seconds: float
    p99_seconds: float
    mean_seconds: float
    device_hours: float
    asleep_hours: float
    woken_ratio: float
    starts: dict[str, int]
    run_seconds: float

    def as_json(self) -> dict[str, object]:
        """For a file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Case:
    """A load that is not made yet."""

    name: str
    model_count: int
    node_count: int
    make: Callable[[int], Load]


def cases(size: Size, trace_directory: Path | None, *, half: int = 1) -> list[Case]:
    """Returns all loads; where there are traces, theirs, of the first (0) or second half, and the dense one."""
    found = [
        Case("seasonal", size.models, size.nodes, partial(_made, seasonal, size)),
        Case("bursty", size.models, size.nodes, partial(_made, bursty, size)),
    ]
    if trace_directory is not None:
        found.append(Case("seasonal, dense", DENSE.models, DENSE.nodes, partial(_made, seasonal, DENSE)))
    for trace in traces(trace_directory, half=half) if trace_directory is not None else ():
        for has_rhythm in (True, False):
            make = partial(_replayed, trace, has_rhythm)
            name = f"{trace.name} {'with a day' if has_rhythm else 'as it is'}"
            found.append(Case(name, _REPLAYED_MODELS, _REPLAYED_NODES, make))
    return found


def run(case: Case, seed: int, policies: Sequence[str] = POLICIES) -> Iterator[Result]:
    """Runs policies over one load, one after another."""
    hardware = Hardware()
    population = models(case.model_count, hardware)
    load = case.make(seed)
    for name in policies:
        begun = time.monotonic()
        starts: dict[str, int] = {}
        if name == ORACLE:
            sizing = policy_of(ORACLE).lifecycle.sizing
            needed = [replica_size(model.entry, sizing, is_gpu=True).memory_bytes for model in population]
            first, device_seconds = oracle(hardware, population, needed, load)
            cold_ratio = woken_ratio = asleep_seconds = 0.0
        else:
            targets = None
            if name == PREDICTIVE:
                (targets,) = expected_targets(load, population, [UsageSettings().target_policy])
            fleet = Fleet(
                policy_of(name), hardware, population, load, node_count=case.node_count, targets=targets
            )  # fmt: skip
            outcome = fleet.run()
            first, device_seconds = np.array(outcome.first_token_seconds), outcome.device_seconds
            asleep_seconds = outcome.asleep_seconds
            cold_ratio, woken_ratio = (float((np.array(outcome.cold) >= least).mean()) for least in (1, 2))
            starts = {tier.name.lower(): count for tier, count in outcome.starts.items()}
            starts["asleep"] = outcome.wake_count
        yield _result(
            case,
            seed,
            name,
            first=first,
            cold_ratio=cold_ratio,
            woken_ratio=woken_ratio,
            device_seconds=device_seconds,
            asleep_seconds=asleep_seconds,
            starts=starts,
            run_seconds=time.monotonic() - begun,
        )


def policy_of(name: str) -> CorePolicy:
    """Returns the settings that are shipped, but for what a policy is about."""
    policy = ProxySettings().core_policy()
    lifecycle = replace(policy.lifecycle, warm_pool=WarmPoolMode.ON if name == PREDICTIVE else WarmPoolMode.OFF)
    if name in (KEEP_ALIVE, SLEEPLESS):
        lifecycle = replace(lifecycle, idle_seconds=_KEEP_ALIVE_SECONDS)
    if name == SLEEPLESS:
        lifecycle = replace(lifecycle, warmth=replace(lifecycle.warmth, sleeps=False))
    return replace(policy, lifecycle=lifecycle)


def _result(
    case: Case,
    seed: int,
    policy: str,
    *,
    first: Floats,
    cold_ratio: float,
    woken_ratio: float,
    device_seconds: float,
    asleep_seconds: float,
    starts: dict[str, int],
    run_seconds: float,
) -> Result:
    answered = first[~np.isnan(first)]
    p50, p99 = np.percentile(answered, [50, 99])
    return Result(
        load=case.name,
        seed=seed,
        policy=policy,
        model_count=case.model_count,
        requests=len(first),
        unanswered=len(first) - len(answered),
        cold_ratio=round(cold_ratio, 5),
        p50_seconds=round(float(p50), 4),
        p99_seconds=round(float(p99), 4),
        mean_seconds=round(float(answered.mean()), 4),
        device_hours=round(device_seconds / 3600, 1),
        asleep_hours=round(asleep_seconds / 3600, 1),
        woken_ratio=round(woken_ratio, 5),
        starts=starts,
        run_seconds=round(run_seconds, 1),
    )


def _made(make: Callable[[int, float, Span, int], Load], size: Size, seed: int) -> Load:
    """Makes a synthetic load."""
    return make(size.models, size.requests_per_second, size.span, seed)


def _replayed(trace: Trace, has_rhythm: bool, seed: int) -> Load:
    return replay(trace, _REPLAYED_MODELS, _REPLAYED_SPAN, seed, has_rhythm=has_rhythm)
