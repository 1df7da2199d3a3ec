"""Which proxy's commands a worker takes: those of the newest leader. Pure; the file of it is ``epoch_file``.

Of several proxies one leads, by a lease whose epoch grows with each grant. A leader that was cut off from the others
does not know that its lease has passed on; whatever it orders then, somebody else has ordered otherwise. So the worker
keeps the highest epoch that any proxy has said and refuses commands of a lower one. The rule needs no clock.

    a proxy says an epoch, in its welcome, a heartbeat or a command   → the highest one counts
    a command of that epoch, or of a higher one                       → taken
    a command of a lower epoch                                        → refused
    a command of epoch 0, from a proxy that knows no leases           → taken, unless a session is open with one that
                                                                        leads by an epoch

The last line is for fleets that go from several proxies to one, and back: a single proxy without leases is obeyed
whatever was before it, and an older one that is still there when others come to lead is not.
"""

from collections.abc import Callable

from helios.mesh.errors import PreconditionFailed

STALE_LEADER = "STALE_LEADER"


class Fence:
    """What was said of epochs, by session.

    ``keep`` is called with each new highest epoch before anything of that epoch is done, so that a successor of this
    process starts with it.
    """

    def __init__(self, epoch: int = 0, keep: Callable[[int], None] = lambda _: None) -> None:
        self.epoch = epoch
        """The highest that any proxy has said."""
        self._keep = keep
        self._said: dict[str, int] = {}

    def hear(self, proxy: str, epoch: int) -> None:
        """Takes what a proxy says of its own epoch; 0: it does not lead."""
        self._said[proxy] = epoch
        if epoch > self.epoch:
            self.epoch = epoch
            self._keep(epoch)

    def left(self, proxy: str) -> None:
        """Notes that the session with a proxy is over."""
        self._said.pop(proxy, None)

    def leader(self) -> str:
        """Returns which proxy leads, of those that a session is open with; empty: none is known to."""
        return next((proxy for proxy, epoch in self._said.items() if epoch and epoch == self.epoch), "")

    def check(self, proxy: str, epoch: int) -> None:
        """Hears a command's epoch. Raises PreconditionFailed (STALE_LEADER) where the command is not to be done."""
        if epoch:
            self.hear(proxy, epoch)
        is_stale = epoch < self.epoch if epoch else bool(self.leader())
        if is_stale:
            raise PreconditionFailed(
                f"another proxy leads with epoch {self.epoch}; the command is of epoch {epoch}",
                reason=STALE_LEADER,
                metadata={"epoch": str(self.epoch)},
            )
