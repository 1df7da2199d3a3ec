"""Operators' calls that are the leader's to answer, at a proxy that does not lead (yet)."""

import asyncio
from typing import Any

import pytest

from helios.api.admin.v1 import admin_service_pb2 as pb
from helios.mesh.errors import Unavailable
from helios.proxy.peers import forward
from helios.proxy.peers.calls import PeerCalls


class Nobody:
    """No other proxy is known."""

    leads = False

    def addresses(self) -> list[str]:
        return []


class Own:
    """An AdminService with one method."""

    async def EvictModel(self, request: Any, context: Any) -> pb.EvictModelResponse:
        return pb.EvictModelResponse()


class Context:
    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None


def servicer(others: Nobody) -> Any:
    own: Any = Own()
    return forward.SharedAdmin(own, PeerCalls(others, identity=None)).as_servicer()


async def test_a_call_waits_for_an_election_that_is_on() -> None:
    others = Nobody()
    shared = servicer(others)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        call = group.create_task(shared.EvictModel(pb.EvictModelRequest(), Context()))
        await asyncio.sleep(0)
        assert not call.done()
        others.leads = True
        assert await call == pb.EvictModelResponse()


async def test_where_none_is_elected_it_is_said_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_ELECTION_SECONDS", 0.1)
    shared = servicer(Nobody())
    with pytest.raises(Unavailable) as caught:
        await shared.EvictModel(pb.EvictModelRequest(), Context())
    assert (caught.value.reason, caught.value.retry_after_seconds) == ("NO_LEADER", 2)
