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
