"""Settings of the storage agent."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from helios.mesh.addresses import dialable
from helios.mesh.settings import ProcessSettings
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.gate import DownloadGate
from helios.mesh.transfer.order import TransferOptions
from helios.storage.prefetch.settings import PrefetchSettings
from helios.storage.tiers import TierKind, TierOptions


class TierSettings(BaseModel):
    """The tier in the state directory."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(default="disk", pattern="[a-z][a-z0-9-]{0,31}")
    """Name in statistics and metrics; unique on the node."""
    kind: TierKind = TierKind.SSD
    """``nvme`` or ``ssd``: fetches go to the fastest disk that has room. ``memory``: files in memory, filled with
    copies of what is used often, and by nothing else; the tier in the state directory is a disk."""
    capacity_bytes: int = Field(default=0, ge=0)
    """Bytes of blobs that the tier may hold. 0: as much as the disk. Unused revisions are evicted for new ones."""
    high_ratio: float = Field(default=0.95, gt=0, le=1)
    """Above this share of the file system in use, by whomever, unused revisions go before the disk is full; also above
    this share of the capacity where a slower tier takes them. 1: only when room is needed."""
    low_ratio: float = Field(default=0.85, gt=0, le=1)
    """Down to this share; and what moves in by policy fills the tier no further. At most high_ratio."""
    links: Literal["auto", "never"] = "auto"
    """``auto``: blobs of a source on the same file system are hard-linked, which takes no room and no copy. ``never``:
    always copied, for a source whose blobs may be changed in place."""

    @model_validator(mode="after")
    def _check_marks(self) -> Self:
        if self.low_ratio > self.high_ratio:
            raise ValueError("low_ratio is above high_ratio")
        return self

    @property
    def options(self) -> TierOptions:
        """The same, for the tier."""
        return TierOptions(self.name, self.kind, self.capacity_bytes, self.high_ratio, self.low_ratio)


class MoreTierSettings(TierSettings):
    """A tier elsewhere."""

    path: Path | None = None
    """Root of the tier, with its blobs, views and index; made when it is not there. One tier a root. Only ``memory``
    can do without: its blobs are sealed memory files then, which holders take as descriptors. With a path, ``memory``
    is a directory in a tmpfs, for loaders that need a stable path; it outlives a restart of the agent and not one of
    the machine. ``memory`` needs a capacity: what it may grow to is no memory that is there."""

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        if self.kind is TierKind.MEMORY and self.capacity_bytes == 0:
            raise ValueError("a tier in memory needs capacity_bytes")
        if self.kind is not TierKind.MEMORY and self.path is None:
            raise ValueError("a tier on a disk needs a path")
        return self


class DescriptorSettings(BaseModel):
    """Handing files in memory over as descriptors, where a tier ``memory`` has no path."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    socket: Path | None = None
    """The unix socket for it. None: ``descriptors.sock`` in the state directory. At most 107 bytes."""
    users: tuple[int, ...] = ()
    """User ids that may connect beside the agent's own. What a connection gets is decided by the id of a lease."""
    grace_seconds: float = Field(default=10.0, ge=0, le=600)
    """How long after a restart holders may hand back what they have; until all is back nothing in memory is evicted or
    filled, and a start that wants such a revision waits. 10: holders notice a restart within a second or two."""


class ScrubSettings(BaseModel):
    """Reading blobs in the background to find bits that flipped on the disk."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    period_seconds: float = Field(default=7 * 86_400, ge=0)
    """Each blob is read and compared with its name once in this time. A week: a terabyte takes 18 hours of it at the
    default rate. 0: never."""
    bytes_per_second: float = Field(default=16 << 20, gt=0)
    """Most that is read in a second. 16 MiB: about a hundredth of a core for hashing, nothing to a disk."""


_SYNC_CHUNKS = 8
"""Ranges that are written before they are synced and noted: what a crash may cost."""


class StoreSettings(BaseModel):
    """Credentials of object stores, by the names of obstore's configuration. The registry says where blobs are, never
    how to be let in.

    Empty: as the cloud's own tools find them (environment, instance metadata).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    s3: dict[str, SecretStr] = Field(default_factory=dict)
    """Such as ``access_key_id``, ``secret_access_key``, ``skip_signature``; also ``endpoint`` and ``region``, where
    this node reaches the store in another way than the registry does."""
    gs: dict[str, SecretStr] = Field(default_factory=dict)
    """Such as ``service_account_path``, ``skip_signature``."""
    az: dict[str, SecretStr] = Field(default_factory=dict)
    """Such as ``account_key``, ``sas_key``."""

    def reveal(self) -> dict[str, dict[str, str]]:
        """The options by scheme, in clear."""
        by_scheme = {"s3": self.s3, "gs": self.gs, "az": self.az}
        return {
            scheme: {name: value.get_secret_value() for name, value in options.items()}
            for scheme, options in by_scheme.items()
        }


class PeerSettings(BaseModel):
    """Storage agents of other nodes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    targets: tuple[str, ...] = ()
    """Addresses, ``host:port``, of agents that the registry does not tell of: those of another registry. Those of the
    same one find each other. A blob that some have, or some of it, is read from them, verified chunk by chunk. A
    registry whose store is a directory is read alone. This node's own address among them does no harm."""
    max_reads: int = Field(default=16, ge=1, le=1024)
    """Ranges that are read for peers at a time; more are refused and asked elsewhere. 16: two peers' fetches."""
    address: str = ""
    """Where other nodes reach this agent, ``host:port``; told to them by the registry. Empty: where it listens, if that
    is a TCP address that others can dial; else nowhere: it then reads from others, and nobody from it. A loopback
    address is told where it listens at no other: then all of its peers are on this machine."""


class FetchSettings(BaseModel):
    """Fetching."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    thread_count: int = Field(default=2, ge=1, le=64)
    """Blobs fetched at a time; each has a second thread for hashing. 2 saturates a disk; sources with latency want
    more."""
    in_flight: int = Field(default=16, ge=1, le=256)
    """Ranges of a blob that are fetched at a time over a network. 16: an object store gives each connection some 85
    MB/s; over a long way up to 64."""
    chunk_bytes: int = Field(default=8 << 20, ge=1 << 16, le=1 << 30)
    """One range, in bytes: what a broken connection costs."""
    bytes_per_second: int = Field(default=0, ge=0)
    """Bound of all fetches over a network together. 0: none."""
    stores: StoreSettings = Field(default_factory=StoreSettings)
    """Credentials of object stores."""

    def make_downloader(self) -> Downloader:
        """The downloader of this node."""
        options = TransferOptions(self.chunk_bytes, self.in_flight, sync_bytes=_SYNC_CHUNKS * self.chunk_bytes)
        gate = DownloadGate(slot_count=self.thread_count * self.in_flight, bytes_per_second=self.bytes_per_second)
        return Downloader(options, gate)


class StorageSettings(ProcessSettings):
    """Settings of `python -m helios.storage`."""

    process_name: ClassVar[str] = "storage"

    node: str = Field(default_factory=socket.gethostname, min_length=1, max_length=253)
    """Name of the node, unique among the agents of a registry. The host's name."""
    state_directory: Path
    """Root of the first disk tier, with its blobs, views and index; made when it is not there. One agent at a time."""
    listen: str = "127.0.0.1:0"
    """Address of StorageService, `host:port` (port 0 takes a free one) or `unix:/path`."""
    second_listen: str = ""
    """A second address of the same service: a unix socket for holders on this node, say. Empty: none."""
    registry_target: str
    """Address of the registry, `host:port` or `unix:/path`."""
    tier: TierSettings = TierSettings()
    """The tier in the state directory."""
    tiers: tuple[MoreTierSettings, ...] = ()
    """More tiers, each a table in the settings file (``[[tiers]]``) or a JSON object on the command line, such as
    ``{"name": "fast", "kind": "nvme", "path": "/mnt/nvme/helios", "capacity_bytes": 200000000000}``."""
    descriptors: DescriptorSettings = DescriptorSettings()
    """Handing files in memory over."""
    scrub: ScrubSettings = ScrubSettings()
    """Reading blobs in the background."""
    fetch: FetchSettings = FetchSettings()
    """Fetching."""
    prefetch: PrefetchSettings = PrefetchSettings()
    """Fetching what is expected to be wanted."""
    peers: PeerSettings = Field(default_factory=PeerSettings)
    """Storage agents of other nodes."""

    def address_for_peers(self, addresses: Sequence[str]) -> str:
        """Where other nodes reach an agent that listens at these addresses; empty: nowhere."""
        return self.peers.address or dialable(addresses)

    @model_validator(mode="after")
    def _check_tiers(self) -> Self:
        names = [self.tier.name, *(tier.name for tier in self.tiers)]
        if len(set(names)) != len(names):
            raise ValueError("two tiers have one name")
        paths = [self.state_directory.absolute(), *(tier.path.absolute() for tier in self.tiers if tier.path)]
        if len(set(paths)) != len(paths):
            raise ValueError("two tiers have one path")
        if self.tier.kind is TierKind.MEMORY:
            raise ValueError("the tier in the state directory is a disk; a tier in memory is one of tiers")
        return self

    @property
    def descriptor_socket(self) -> Path:
        """Where files in memory are handed over."""
        return self.descriptors.socket or self.state_directory.absolute() / "descriptors.sock"
