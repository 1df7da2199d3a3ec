"""What `helios why` and `helios requests` draw."""

import io

from rich.console import Console

from helios.api.admin.v1 import admin_service_pb2 as admin_pb
from helios.api.admin.v1 import explanation_pb2 as pb
from helios.cli.why import drawn, listed


def test_a_name_that_a_client_sent_is_no_markup() -> None:
    name = "[/red]\N{SNOWMAN}[link=http://x]"
    summary = pb.RequestSummary(request_id="q", requested_model=name, state=pb.REQUEST_STATE_REFUSED)
    text = io.StringIO()
    console = Console(file=text, width=200)
    console.print(listed(admin_pb.ListRequestsResponse(requests=[summary])))
    console.print(drawn(pb.RequestExplanation(summary=summary)))
    assert text.getvalue().count(name) == 2


def test_where_a_durable_answer_went_on_is_drawn() -> None:
    explanation = pb.RequestExplanation(summary=pb.RequestSummary(request_id="q", model="m"))
    broken = explanation.moves.add(left="r-1", reached="r-2", reason="REPLICA_LOST", token_count=12)
    broken.waited.FromMilliseconds(250)
    explanation.moves.add(left="r-2", reached="r-3", is_drain=True, reason="DRAINING", token_count=30)
    explanation.moves.add(left="r-3", reason="LOST, EXPIRED", token_count=31).waited.FromSeconds(120)
    text = io.StringIO()
    Console(file=text, width=200).print(drawn(explanation))
    assert [line.strip() for line in text.getvalue().splitlines() if line.startswith("after")] == [
        "after 12 tokens replica r-1 broke off (REPLICA_LOST): the answer went on at r-2 250.0 ms later",
        "after 30 tokens replica r-2 drains: the answer went on at r-3",
        "after 31 tokens replica r-3 broke off (LOST, EXPIRED): no other one could go on, looked for over 120.00 s",
    ]
