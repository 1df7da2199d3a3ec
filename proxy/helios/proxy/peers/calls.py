"""Calls of other proxies on behalf of somebody who called this one.

A call is passed on once by whoever got it and once by the leader, so that two that take each other for the leader don't
pass it on for ever.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol, Self

import grpc.aio

from helios.mesh.calls import answer_of
from helios.mesh.channel import Dialer
from helios.mesh.identity import IdentityFiles

_FORWARDED: Final = "x-helios-forwarded"
_MOST_HOPS: Final = 2
CALL_SECONDS: Final = 10.0
_MOST_CHANNELS: Final = 32
"""Channels that are kept: proxies that are gone had addresses, too. Far more than there are proxies, so that none is
closed that carries a call.
"""


class Others(Protocol):
    """The other proxies, as far as this one knows them."""

    @property
    def leads(self) -> bool:
        """Whether this proxy leads."""
        ...

    def addresses(self) -> list[str]:
        """Where they are reached: of a follower's, the leader; of the leader's, all followers."""
        ...


class PeerCalls:
    """Passes calls on; open it with ``async with``. Nothing is dialled before it is called."""

    def __init__(self, others: Others, *, identity: IdentityFiles | None) -> None:
        self._others = others
        self._identity = identity
        self._dialers: dict[str, Dialer] = {}
        """By address; the one that was used last is last."""

    @property
    def leads(self) -> bool:
        """Whether this proxy leads."""
        return self._others.leads

    async def __aenter__(self) -> Self:
        """Nothing is dialled yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the channels."""
        while self._dialers:
            await self._close_first()

    def addresses(self, context: Any) -> list[str]:
        """Where a call that came here may be passed on to."""
        return self._others.addresses() if _hop_count(context) < _MOST_HOPS else []

    async def ask(
        self,
        address: str,
        stub_class: Callable[[grpc.aio.Channel], Any],
        name: str,
        request: Any,
        context: Any,
        *,
        seconds: float = CALL_SECONDS,
    ) -> Any:
        """Passes a unary call on, within its own deadline. Raises HeliosError."""
        method = getattr(await self.stub(address, stub_class), name)
        remaining = context.time_remaining()
        timeout = min(seconds, remaining) if remaining is not None else seconds
        return await answer_of(method(request, timeout=timeout, metadata=hops(context)))

    async def stub(self, address: str, stub_class: Callable[[grpc.aio.Channel], Any]) -> Any:
        """A stub of another proxy, for one call, which is to carry `hops`."""
        dialer = self._dialers.pop(address, None)
        if dialer is None:
            dialer = Dialer(address, identity=self._identity, peer="proxy")
            await dialer.__aenter__()
        self._dialers[address] = dialer
        if len(self._dialers) > _MOST_CHANNELS:
            await self._close_first()
        return dialer.stub(stub_class)

    async def _close_first(self) -> None:
        dialer = self._dialers.pop(next(iter(self._dialers)))
        await dialer.__aexit__(None, None, None)


def hops(context: Any) -> tuple[tuple[str, str], ...]:
    """What a call that is passed on carries."""
    return ((_FORWARDED, str(_hop_count(context) + 1)),)


def _hop_count(context: Any) -> int:
    metadata = context.invocation_metadata() or ()
    text = next((str(value) for key, value in metadata if key == _FORWARDED), "0")
    return int(text) if text.isdecimal() else _MOST_HOPS
