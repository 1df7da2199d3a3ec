"""``helios why`` and ``helios requests``: where a request's time went, drawn for people.

The proxy lays the phases out (they add up by construction); here they are only drawn, so ``--json`` says the same.
"""

import json
from datetime import UTC, datetime
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from helios.api.admin.v1 import admin_service_pb2 as admin_pb
from helios.api.admin.v1 import explanation_pb2 as pb
from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from helios.cli.edge import open_admin
from helios.cli.state import StateDirectory
from helios.mesh.durations import seconds_from_proto
from helios.mesh.errors import InvalidRequest, NotFound

_CALL_SECONDS: Final = 15.0
# 80 columns have room for the reasons beside it.
_BAR_WIDTH: Final = 12
# Of a UUID, which Envoy makes of a request without an id.
_ID_WIDTH: Final = 36
_WHOLE_WIDTH: Final = 72
_BLOCKS: Final = " ▏▎▍▌▋▊▉█"
_COLORS: Final = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta")
_UNEXPLAINED: Final = "unexplained"
_STATES: Final = tuple(name.removeprefix("REQUEST_STATE_").lower() for name in pb.RequestState.keys()[1:])


async def why(state: StateDirectory, console: Console, wanted: str, *, is_last: bool, is_json: bool) -> None:
    """Explains a request: the one with the id ``wanted``, or with ``is_last`` the last one, of that model if it is set.

    Raises:
        InvalidRequest: neither an id nor ``is_last``.
        NotFound: the request, or any request, is not remembered.
    """
    if not wanted and not is_last:
        raise InvalidRequest("name a request by its x-request-id, or say --last; `helios requests` lists them")
    async with open_admin(state) as dialer:
        admin = dialer.stub(AdminServiceStub)
        request_id = wanted
        if is_last:
            listing = admin_pb.ListRequestsRequest(model=wanted, page_size=1)
            found = await admin.ListRequests(listing, timeout=_CALL_SECONDS)
            if not found.requests:
                which = f"for {wanted} " if wanted else ""
                raise NotFound(f"no request {which}is remembered", reason="REQUEST_NOT_FOUND")
            request_id = found.requests[0].request_id
        response = await admin.ExplainRequest(
            admin_pb.ExplainRequestRequest(request_id=request_id), timeout=_CALL_SECONDS
        )
    if is_json:
        document = MessageToDict(
            response.explanation, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        console.print_json(json.dumps(document))
    else:
        console.print(drawn(response.explanation), highlight=False)


async def requests(
    state: StateDirectory, console: Console, *, model: str, status: str, count: int, is_json: bool
) -> None:
    """Lists the newest requests that can be explained. Raises InvalidRequest for a status that there is not."""
    if status and status not in _STATES:
        raise InvalidRequest(f"no such status: {status}; there is {', '.join(_STATES)}")
    wanted = pb.RequestState.Value(f"REQUEST_STATE_{status.upper() or 'UNSPECIFIED'}")
    async with open_admin(state) as dialer:
        request = admin_pb.ListRequestsRequest(model=model, state=wanted, page_size=count)
        response = await dialer.stub(AdminServiceStub).ListRequests(request, timeout=_CALL_SECONDS)
    if is_json:
        found = MessageToDict(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        console.print_json(json.dumps(found["requests"]))
        return
    console.print(listed(response))


def listed(response: admin_pb.ListRequestsResponse) -> Table:
    """Draws a list of requests, a row each."""
    table = Table(box=box.SIMPLE_HEAD)
    # Whole however narrow the terminal is: it is what `helios why` is given.
    table.add_column("request", no_wrap=True, min_width=_ID_WIDTH)
    for name in ("arrived", "model", "status", "TTFT", "tokens"):
        table.add_column(name, overflow="fold", no_wrap=name != "model")
    for entry in response.requests:
        tokens = f"{entry.prompt_tokens} + {entry.completion_tokens}" if entry.prompt_tokens else ""
        first = _ms(entry.time_to_first_token) if entry.HasField("time_to_first_token") else ""
        arrived = _local(entry).strftime("%H:%M:%S")
        # As text: a name that a client sent may look like markup.
        asked_for = Text(entry.requested_model)
        table.add_row(Text(entry.request_id), arrived, asked_for, _state_name(entry), first, tokens)
    return table


def drawn(explanation: pb.RequestExplanation) -> Group:
    """Draws an explanation: what it was, one bar of all phases, a row for each with its reason, the starts, the end."""
    summary = explanation.summary
    parts: list[Text | Table] = [
        _head(summary),
        Text(f"{_said_of_whole(summary)} {_ms(explanation.explained)}", "bold"),
    ]
    parts += [_whole_bar(explanation), _phase_table(explanation)]
    parts += [_start_line(start) for start in explanation.starts]
    if explanation.HasField("pick"):
        parts.append(_pick_line(explanation.pick))
    parts += [_move_line(move) for move in explanation.moves]
    if explanation.HasField("refusal"):
        refusal = explanation.refusal
        told = f"; told to try again in {_ms(refusal.retry_after)}" if refusal.HasField("retry_after") else ""
        parts.append(Text(f"refused: {refusal.reason}: {refusal.message}{told}", "red"))
    parts.append(_end_line(summary))
    return Group(*parts)


def shares(explanation: pb.RequestExplanation) -> list[float]:
    """The phases' shares of the whole, 0 to 1; they add up to 1 where there is a whole."""
    seconds = [seconds_from_proto(phase.duration) for phase in explanation.phases]
    whole = sum(seconds)
    return [one / whole if whole else 0.0 for one in seconds]


def _head(summary: pb.RequestSummary) -> Text:
    alias = f" (asked for as {summary.requested_model})" if summary.requested_model != summary.model else ""
    model = f"{summary.model}{alias}" if summary.model else f"unknown model {summary.requested_model!r}"
    text = Text(f"{summary.request_id}  ", "bold")
    return text.append(f"{model}  {_local(summary):%Y-%m-%d %H:%M:%S}  {_state(summary)}", "default")


def _said_of_whole(summary: pb.RequestSummary) -> str:
    if summary.HasField("time_to_first_token"):
        return "time to first token"
    return "time to the answer" if summary.HasField("duration") else "so far"


def _whole_bar(explanation: pb.RequestExplanation) -> Text:
    bar, whole = Text(), 0.0
    for index, share in enumerate(shares(explanation)):
        whole += share
        name = explanation.phases[index].phase
        bar.append("█" * (round(whole * _WHOLE_WIDTH) - len(bar)), _color(index, name))
    return bar


def _phase_table(explanation: pb.RequestExplanation) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("phase", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("%", justify="right", no_wrap=True)
    table.add_column("", width=_BAR_WIDTH, no_wrap=True)
    table.add_column("why", overflow="fold")
    for index, (phase, share) in enumerate(zip(explanation.phases, shares(explanation), strict=True)):
        color = _color(index, phase.phase)
        bar = Text(_bar(share), color)
        milliseconds = f"{seconds_from_proto(phase.duration) * 1e3:,.1f}"
        table.add_row(Text(phase.phase, color), milliseconds, f"{share:.1%}".rstrip("%"), bar, Text(phase.reason))
    table.add_section()
    total = sum(seconds_from_proto(phase.duration) for phase in explanation.phases)
    table.add_row("total", f"{total * 1e3:,.1f}", f"{sum(shares(explanation)):.1%}".rstrip("%"), "", "")
    return table


def _bar(share: float) -> str:
    eighths = round(share * _BAR_WIDTH * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_BLOCKS[rest] if rest else "")


def _color(index: int, name: str) -> str:
    return "red" if name == _UNEXPLAINED else _COLORS[index % len(_COLORS)]


def _start_line(start: pb.StartExplanation) -> Text:
    by = f"asked for by {start.requested_by}" if start.requested_by else "asked for by no request"
    text = Text(f"start {start.replica_id or '(not ordered)'} on {start.worker_id or 'no worker'}: {by}")
    if start.placement:
        text.append(f"; {start.placement}")
    for wait in start.waits:
        text.append(f"\n  waited: {wait}")
    if start.failure:
        text.append(f"\n  failed: {start.failure}", "red")
    return text


def _pick_line(pick: pb.PickExplanation) -> Text:
    text = Text(f"picked among {pick.candidate_count}:")
    for candidate in pick.candidates:
        scores = ", ".join(f"{name} {value:.2f}" for name, value in sorted(candidate.scores.items()))
        chosen = f"choice {candidate.choice}" if candidate.choice else "not tried"
        text.append(f"\n  {candidate.replica_id} {candidate.score:.3f} ({scores}): {chosen}")
    if pick.weights:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in sorted(pick.weights.items()))
        text.append(f"\n  weighed: {shares}")
    for excluded in pick.excluded:
        text.append(f"\n  {excluded.replica_id}: {excluded.reason}")
    return text


def _move_line(move: pb.RequestMove) -> Text:
    why = "drains" if move.is_drain else f"broke off ({move.reason})"
    text = Text(f"after {move.token_count} tokens replica {move.left} {why}: ")
    if not move.reached:
        return text.append(f"no other one could go on, looked for over {_ms(move.waited)}", "red")
    rest = "" if move.is_drain else f" {_ms(move.waited)} later"
    return text.append(f"the answer went on at {move.reached}{rest}")


def _end_line(summary: pb.RequestSummary) -> Text:
    if not summary.replica_id:
        return Text("")
    tokens = f", {summary.prompt_tokens} + {summary.completion_tokens} tokens" if summary.prompt_tokens else ""
    whole = f" in {_ms(summary.duration)}" if summary.HasField("duration") else ""
    return Text(f"{_state(summary)} at replica {summary.replica_id}{whole}{tokens}", "dim")


def _state_name(summary: pb.RequestSummary) -> str:
    return pb.RequestState.Name(summary.state).removeprefix("REQUEST_STATE_").lower()


def _state(summary: pb.RequestSummary) -> str:
    name = _state_name(summary)
    if summary.reason:
        return f"{name} ({summary.reason})"
    return f"{name} (gRPC {summary.status_code})" if summary.status_code else name


def _local(summary: pb.RequestSummary) -> datetime:
    return summary.arrived_at.ToDatetime(tzinfo=UTC).astimezone()


def _ms(duration: Duration) -> str:
    seconds = seconds_from_proto(duration)
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
