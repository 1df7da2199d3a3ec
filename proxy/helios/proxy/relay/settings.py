"""Settings of the relay."""

from typing import ClassVar

from pydantic import ByteSize, Field, NonNegativeInt, PositiveFloat, PositiveInt

from helios.mesh.settings import CLOSE_SECONDS, ProcessSettings


class RelaySettings(ProcessSettings):
    """Settings of `python -m helios.proxy.relay`."""

    process_name: ClassVar[str] = "proxy.relay"

    listen: str = "127.0.0.1:0"
    """`ip:port` or `unix:/path` of the calls that Envoy sends here."""
    proxies: list[str] = Field(default_factory=list)
    """`ip:port` or `unix:/path` of the proxies' control services. Where one does not answer, the next is asked."""
    replace_seconds: PositiveFloat = 120.0
    """How long an answer that broke off waits for another replica, which may have to be started, in seconds. 120: the
    start of a large model from disk; clients wait with nothing coming."""
    barren_limit: PositiveInt = 3
    """Replicas in a row that may break off without one token more; then the answer fails. 3: a request that kills its
    replicas must not kill all of them."""
    max_held_bytes: ByteSize = ByteSize(1 << 30)
    """What requests under way may take together, in bytes. 1 GiB: some two thousand of ordinary size."""
    drain_seconds: NonNegativeInt = 5
    """How long answers may go on when the process stops, in seconds."""

    @property
    def stop_limit_seconds(self) -> float:
        """How long the whole stop may take."""
        return max(self.stop_seconds, self.drain_seconds + CLOSE_SECONDS)
