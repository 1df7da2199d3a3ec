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
