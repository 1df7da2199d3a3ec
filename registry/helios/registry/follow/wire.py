"""Followed sources as messages and back."""

from datetime import UTC
from typing import Final

from helios.api.registry.v1 import follow_service_pb2 as pb
from helios.registry import wire
from helios.registry.follow.following import DEFAULT_INTERVAL, Following, Policy, Wish

_POLICIES: Final = {
    Policy.KEEP: pb.FOLLOW_POLICY_KEEP,
    Policy.MOVE: pb.FOLLOW_POLICY_MOVE,
    Policy.ROLLOUT: pb.FOLLOW_POLICY_ROLLOUT,
}
_POLICIES_BACK: Final = {number: policy for policy, number in _POLICIES.items()}


def request_from_proto(message: pb.PutFollowingRequest) -> Wish:
    """Reads what is to be followed; ``Wish.check`` judges it."""
    return Wish(
        source=message.source,
        include=tuple(message.include),
        exclude=tuple(message.exclude),
        interval=message.interval.ToTimedelta() if message.HasField("interval") else DEFAULT_INTERVAL,
        policy=_POLICIES_BACK.get(message.policy, Policy.KEEP),
        weight_percent=message.weight_percent,
    )


def request_to_proto(model: str, wish: Wish) -> pb.PutFollowingRequest:
    """Returns what is to be followed on the wire."""
    message = pb.PutFollowingRequest(
        model=model,
        source=wish.source,
        include=wish.include,
        exclude=wish.exclude,
        policy=_POLICIES[wish.policy],
        weight_percent=wish.weight_percent,
    )
    message.interval.FromTimedelta(wish.interval)
    return message


def following_to_proto(following: Following) -> pb.Following:
    """Returns what a model follows on the wire."""
    wish = following.wish
    message = pb.Following(
        model=following.model,
        source=wish.source,
        include=wish.include,
        exclude=wish.exclude,
        policy=_POLICIES[wish.policy],
        weight_percent=wish.weight_percent,
        error=following.error,
        error_reason=following.error_reason,
        failure_count=following.failure_count,
        next_at=wire.timestamp_to_proto(following.next_at),
    )
    message.interval.FromTimedelta(wish.interval)
    if following.checked_at is not None:
        message.checked_at.FromDatetime(following.checked_at)
    if following.changed_at is not None:
        message.changed_at.FromDatetime(following.changed_at)
    return message


def following_from_proto(message: pb.Following) -> Following:
    """Reads what a model follows; the fingerprint is the registry's own."""
    wish = Wish(
        source=message.source,
        include=tuple(message.include),
        exclude=tuple(message.exclude),
        interval=message.interval.ToTimedelta(),
        policy=_POLICIES_BACK.get(message.policy, Policy.KEEP),
        weight_percent=message.weight_percent,
    )
    return Following(
        model=message.model,
        wish=wish,
        next_at=message.next_at.ToDatetime(UTC),
        checked_at=message.checked_at.ToDatetime(UTC) if message.HasField("checked_at") else None,
        changed_at=message.changed_at.ToDatetime(UTC) if message.HasField("changed_at") else None,
        error=message.error,
        error_reason=message.error_reason,
        failure_count=message.failure_count,
    )
