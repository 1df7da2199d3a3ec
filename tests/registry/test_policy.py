"""A model's policy beyond its two bounds: kept, told over the wire, and refused where it contradicts itself."""

import json
from dataclasses import replace
from typing import Any

import pytest

from helios.mesh.errors import InvalidRequest
from helios.mesh.routing import NAMES, Choice, ModelRouting
from helios.mesh.windows import Window
from helios.registry import wire
from helios.registry.policy import ModelPolicy, policy_of

HOUR = 3600.0
WINDOW = Window("0 8 * * MON-FRI", 10 * HOUR, "Europe/Berlin", min_replicas=2, max_replicas=0)
FULL = ModelPolicy(1, 3, (WINDOW, Window("0 0 1 * *", 60.0, max_replicas=2)), 60.0, 0.0, 3600.5)


def saying(name: str, value: Any) -> ModelRouting:
    """What a policy says of routing that names one thing."""
    return ModelRouting(**{name: value})


@pytest.mark.parametrize(
    "policy",
    [
        ModelPolicy(),
        ModelPolicy(1, 2),
        FULL,
        ModelPolicy(idle_seconds=0.0, is_durable=True),
        ModelPolicy(routing=ModelRouting(0.5, 0.0, 1.0, 0.3, 0.0, 0.2, Choice.POWER_OF_TWO, 0.25, 0.125)),
        ModelPolicy(routing=ModelRouting(session_weight=0.0)),
    ],
)
def test_a_policy_is_kept_and_told_as_it_was_said(policy: ModelPolicy) -> None:
    assert policy.check() == policy
    assert policy_of(policy.min_replicas, policy.max_replicas, policy.scaling_document) == policy
    assert wire.policy_from_proto(wire.policy_to_proto(policy)) == policy


def test_a_policy_without_more_takes_no_room_and_what_is_newer_is_left_out() -> None:
    assert ModelPolicy(1, 2).scaling_document == "{}"
    newer = json.dumps(json.loads(FULL.scaling_document) | {"moon_phase": "full"})
    assert policy_of(1, 3, newer) == FULL
    document = json.dumps({"routing": {"prefix_weight": 0.5, "moon_weight": 1.0}})
    assert policy_of(0, 0, document) == ModelPolicy(routing=ModelRouting(prefix_weight=0.5))


@pytest.mark.parametrize(
    "policy",
    [
        replace(FULL, windows=(replace(WINDOW, begins="at eight"),)),
        replace(FULL, windows=(replace(WINDOW, time_zone="Nowhere"),)),
        replace(FULL, windows=(replace(WINDOW, min_replicas=None, max_replicas=None),)),
        replace(FULL, windows=(replace(WINDOW, min_replicas=3, max_replicas=2),)),
        replace(FULL, windows=(replace(WINDOW, max_replicas=1 << 20),)),
        replace(FULL, windows=(WINDOW,) * 33),
        replace(FULL, idle_seconds=-1.0),
        replace(FULL, staged_seconds=1e9),
    ],
)
def test_what_contradicts_itself_is_refused(policy: ModelPolicy) -> None:
    with pytest.raises(InvalidRequest) as refused:
        policy.check()
    assert refused.value.reason == "INVALID_POLICY"


@pytest.mark.parametrize(
    ("routing", "word"),
    [
        *((saying(name, value), name) for name in NAMES if name != "choice" for value in (-0.1, 1.5, 1e300)),
        *((saying(name, float(text)), name) for name in ("kv_weight", "prefix_weight") for text in ("nan", "inf")),
        (ModelRouting(prefix_weight=1.0), "prefix_weight"),
        (ModelRouting(prefix_weight=0.6, session_weight=0.4), "prefix_weight and session_weight"),
        (ModelRouting(kept_for_high_ratio=0.5, kept_from_low_ratio=0.5), "kept_for_high_ratio and kept_from_low_ratio"),
        (ModelRouting(0.0, 0.0, 0.0), "queue_weight, running_weight, kv_weight"),
    ],
)
def test_weights_that_are_none_are_refused_by_name(routing: ModelRouting, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word) as refused:
        ModelPolicy(routing=routing).check()
    assert refused.value.reason == "INVALID_POLICY"


def test_a_load_of_one_part_is_a_load() -> None:
    assert ModelRouting(0.0, 0.0, 1.0).problem() == ""
    assert ModelRouting(0.0, 0.0).problem() == ""
