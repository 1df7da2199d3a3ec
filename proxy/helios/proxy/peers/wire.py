"""What proxies tell each other, as messages and back."""

from typing import Final

from helios.api.proxy.v1 import peer_service_pb2 as pb
from helios.mesh.durations import seconds_from_proto, seconds_to_proto
from helios.proxy.activation.machine import ActivationState
from helios.proxy.peers.messages import (
    Failure,
    Granted,
    Hello,
    News,
    Outlook,
    Report,
    SliceGrant,
    SliceKey,
    SliceReport,
    Spent,
)

_STATES: Final = {pb.ActivationState.Value(f"ACTIVATION_STATE_{state.name}"): state for state in ActivationState}
_NUMBERS: Final = {state: number for number, state in _STATES.items()}


def hello_to_proto(hello: Hello) -> pb.Hello:
    """Writes a hello."""
    return pb.Hello(proxy_id=hello.proxy_id, incarnation=hello.incarnation, epoch=hello.epoch, address=hello.address)


def hello_from_proto(message: pb.Hello) -> Hello:
    """Reads a hello."""
    return Hello(message.proxy_id, message.incarnation, message.epoch, message.address)


def report_to_proto(report: Report) -> pb.Report:
    """Writes a report."""
    return pb.Report(
        sent_at=report.sent_at,
        heard_at=report.heard_at,
        held=[pb.HeldRequests(model=model, count=count) for model, count in report.held],
        used=[pb.UsedModel(model=model, ago=seconds_to_proto(seconds)) for model, seconds in report.used],
        wished=report.wished,
        slices=[
            pb.SliceReport(key=_key_to_proto(one.key), requests=_spent(one.requests), tokens=_spent(one.tokens))
            for one in report.slices
        ],
    )


def report_from_proto(message: pb.Report) -> Report:
    """Reads a report."""
    return Report(
        message.sent_at,
        message.heard_at,
        held=tuple((held.model, held.count) for held in message.held),
        used=tuple((used.model, seconds_from_proto(used.ago)) for used in message.used),
        wished=tuple(message.wished),
        slices=tuple(
            SliceReport(_key_from_proto(one.key), _spent_from(one.requests), _spent_from(one.tokens))
            for one in message.slices
        ),
    )


def news_to_proto(news: News) -> pb.News:
    """Writes news."""
    return pb.News(
        epoch=news.epoch,
        sent_at=news.sent_at,
        heard_at=news.heard_at,
        draining=pb.Draining(replica_ids=news.draining) if news.draining is not None else None,
        outlooks=[_outlook_to_proto(outlook) for outlook in news.outlooks],
        failures=[
            pb.StartFailure(
                model=failed.model,
                reason=failed.reason,
                message=failed.message,
                retry_after=seconds_to_proto(failed.retry_after_seconds),
            )
            for failed in news.failures
        ],
        estimates=[
            pb.StartEstimate(model=model, seconds=seconds_to_proto(seconds)) for model, seconds in news.estimates
        ],
        slices=[
            pb.SliceGrant(key=_key_to_proto(one.key), requests=_granted(one.requests), tokens=_granted(one.tokens))
            for one in news.slices
        ],
        forgotten=[pb.ForgottenUse(model=model, ago=seconds_to_proto(seconds)) for model, seconds in news.forgotten],
    )


def news_from_proto(message: pb.News) -> News:
    """Reads news."""
    return News(
        message.epoch,
        message.sent_at,
        message.heard_at,
        draining=tuple(message.draining.replica_ids) if message.HasField("draining") else None,
        outlooks=tuple(_outlook_from_proto(outlook) for outlook in message.outlooks),
        failures=tuple(
            Failure(one.model, one.reason, one.message, seconds_from_proto(one.retry_after)) for one in message.failures
        ),
        estimates=tuple((one.model, seconds_from_proto(one.seconds)) for one in message.estimates),
        slices=tuple(
            SliceGrant(_key_from_proto(one.key), _granted_from(one.requests), _granted_from(one.tokens))
            for one in message.slices
        ),
        forgotten=tuple((one.model, seconds_from_proto(one.ago)) for one in message.forgotten),
    )


def _outlook_to_proto(outlook: Outlook) -> pb.Outlook:
    return pb.Outlook(
        model=outlook.model,
        state=_NUMBERS[outlook.state],
        remaining=seconds_to_proto(outlook.remaining_seconds),
        failure=outlook.failure,
    )


def _outlook_from_proto(message: pb.Outlook) -> Outlook:
    # One that a newer version sends is as good as none.
    state = _STATES.get(message.state, ActivationState.IDLE)
    return Outlook(message.model, state, seconds_from_proto(message.remaining), message.failure)


def _key_to_proto(key: SliceKey) -> pb.SliceKey:
    return pb.SliceKey(
        key_id=key.key_id,
        requests_per_minute=key.requests_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        number=key.number,
    )


def _key_from_proto(message: pb.SliceKey) -> SliceKey:
    return SliceKey(message.key_id, message.requests_per_minute, message.tokens_per_minute, message.number)


def _spent(spent: Spent) -> pb.Spent:
    return pb.Spent(wanted=spent.wanted, used=spent.used, owed=spent.owed, returned=spent.returned)


def _spent_from(message: pb.Spent) -> Spent:
    return Spent(message.wanted, message.used, message.owed, message.returned)


def _granted(granted: Granted) -> pb.Granted:
    return pb.Granted(
        granted=granted.granted,
        remaining=granted.remaining,
        reset=seconds_to_proto(granted.reset_seconds),
        wait=seconds_to_proto(granted.wait_seconds),
        reclaimed=granted.is_reclaimed,
    )


def _granted_from(message: pb.Granted) -> Granted:
    return Granted(
        message.granted,
        message.remaining,
        seconds_from_proto(message.reset),
        seconds_from_proto(message.wait),
        message.reclaimed,
    )
