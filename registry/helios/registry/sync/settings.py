"""Settings of the sessions with storage agents."""

from pydantic import BaseModel, ConfigDict, Field


class SyncSettings(BaseModel):
    """Sessions with storage agents."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    heartbeat_seconds: float = Field(default=2.0, ge=0.05, le=60)
    """How long a session may be silent before either side says that it is there; five times this ends it, and with it
    the agent's claims. 2: a node that was cut off holds the others up for 10 s."""
    claim_seconds: float = Field(default=60.0, ge=1)
    """How long an agent may take to read one span (8 MiB by default) from the cloud before another may as well. 60: at
    140 KB/s. Less than a span takes costs the cloud's bytes twice."""
    address: str = ""
    """Where other registries on the same database reach this one, ``host:port``. Empty: where it listens, if that is an
    address and no wildcard. One that others can't reach passes its agents on, and never brings them together itself."""
    coordinator_seconds: float = Field(default=10.0, ge=3, le=300)
    """How long other registries wait for the one that brings the agents together, when it died, before another one
    does. Of no meaning for SQLite, which has one registry. 10: a registry that is only slow keeps it."""
