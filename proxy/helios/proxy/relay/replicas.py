"""Channels to replicas, by address: made when one is called, kept while it is called now and then."""

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from helios.mesh.channel import Dialer
from helios.mesh.identity import IdentityFiles

# Replicas come and go, each with a port of its own; a channel that nobody uses is some 50 KiB and a socket.
_IDLE_COUNT = 32


class Replicas:
    """Lends channels; closes those that nobody has used for longest, and all of them in the end."""

    def __init__(self, identity: IdentityFiles | None) -> None:
        """``identity`` is the relay's; None dials without TLS."""
        self._identity = identity
        self._stacks: OrderedDict[str, tuple[Dialer, AsyncExitStack]] = OrderedDict()
        self._lent: dict[str, int] = {}

    @asynccontextmanager
    async def lend(self, address: str) -> AsyncIterator[Dialer]:
        """Gives the channel to a replica for as long as the block runs."""
        self._lent[address] = self._lent.get(address, 0) + 1
        try:
            if address not in self._stacks:
                stack = AsyncExitStack()
                dialer = await stack.enter_async_context(Dialer(address, identity=self._identity, peer="worker"))
                if address in self._stacks:
                    # Another request has dialled meanwhile.
                    await stack.aclose()
                else:
                    self._stacks[address] = dialer, stack
            self._stacks.move_to_end(address)
            yield self._stacks[address][0]
        finally:
            self._lent[address] -= 1
            if not self._lent[address]:
                del self._lent[address]
            await self._close_idle(_IDLE_COUNT)

    async def close(self) -> None:
        """Closes what nobody uses; for the end, when all calls are over."""
        await self._close_idle(0)

    async def _close_idle(self, kept_count: int) -> None:
        idle = [address for address in self._stacks if address not in self._lent]
        for address in idle[: max(0, len(idle) - kept_count)]:
            _, stack = self._stacks.pop(address)
            await stack.aclose()
