"""Settings of the storage agent."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from helios.mesh.settings import ProcessSettings


class TierSettings(BaseModel):
    """The disk tier."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    capacity_bytes: int = Field(default=0, ge=0)
    """Bytes of blobs that the tier may hold. 0: as much as the disk. Unused revisions are evicted for new ones."""
    links: Literal["auto", "never"] = "auto"
    """``auto``: blobs of a source on the same file system are hard-linked, which takes no room and no copy. ``never``:
    always copied, for a source whose blobs may be changed in place."""


class FetchSettings(BaseModel):
    """Fetching."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    thread_count: int = Field(default=2, ge=1, le=64)
    """Blobs fetched at a time; each has a second thread for hashing. 2 saturates a disk; sources with latency want
    more."""


class StorageSettings(ProcessSettings):
    """Settings of `python -m helios.storage`."""

    process_name: ClassVar[str] = "storage"

    state_directory: Path
    """Root of the disk tier, with its blobs, views and index; made when it is not there. One agent at a time."""
    listen: str = "127.0.0.1:0"
    """Address of StorageService, `host:port` (port 0 takes a free one) or `unix:/path`."""
    second_listen: str = ""
    """A second address of the same service: a unix socket for holders on this node, say. Empty: none."""
    registry_target: str
    """Address of the registry, `host:port` or `unix:/path`."""
    tier: TierSettings = TierSettings()
    """The disk tier."""
    fetch: FetchSettings = FetchSettings()
    """Fetching."""
