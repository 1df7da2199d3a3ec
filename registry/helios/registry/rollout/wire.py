"""Rollouts as messages and back; the one that a model has is ``registry.wire``'s."""

from datetime import UTC
from typing import Final

from helios.api.registry.v1 import rollout_service_pb2 as pb
from helios.registry import wire
from helios.registry.rollout.steps import Act, RolloutStep

_ACTS: Final = {
    Act.WEIGHT: pb.ROLLOUT_ACT_WEIGHT,
    Act.PROMOTE: pb.ROLLOUT_ACT_PROMOTE,
    Act.ABORT: pb.ROLLOUT_ACT_ABORT,
    Act.REPLACE: pb.ROLLOUT_ACT_REPLACE,
}
_ACTS_BACK: Final = {number: act for act, number in _ACTS.items()}


def step_to_proto(step: RolloutStep) -> pb.RolloutStep:
    """Returns a step on the wire."""
    return pb.RolloutStep(
        version=step.version,
        revision=step.revision,
        weight_percent=step.weight_percent,
        act=_ACTS[step.act],
        actor=step.actor,
        at=wire.timestamp_to_proto(step.at),
    )


def step_from_proto(message: pb.RolloutStep) -> RolloutStep:
    """Reads a step; an act of a newer registry is told as a change of weight."""
    return RolloutStep(
        version=message.version,
        revision=message.revision,
        weight_percent=message.weight_percent,
        act=_ACTS_BACK.get(message.act, Act.WEIGHT),
        actor=message.actor,
        at=message.at.ToDatetime(UTC),
    )
