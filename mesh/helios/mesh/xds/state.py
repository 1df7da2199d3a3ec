"""Which Envoy has which version of a resource: the pure part of the ADS server.

Delta xDS in one type and one resource, which is a set of entries: a cluster's endpoints, the models of the express
lane. A stream subscribes to it, gets the newest version, answers with the
response's nonce (an error detail makes the answer a NACK), and only then gets the next: a slow Envoy skips versions
and never queues them.

    stream:  connected ──subscribe──▶ idle ──respond──▶ waiting ──ack/nack──▶ idle ──(newer version)──▶ waiting …
                                       ▲                                                │
                                       └──────────────── unsubscribe ───────────────────┘

A NACKed version is not sent to that stream again; the next version is.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import count
from typing import Final, Generic, TypeVar

from helios.mesh.errors import Bug, InvalidRequest

CLUSTER: Final = "replicas"
Entry = TypeVar("Entry")
# Before anything is published versions are at this, which nobody can lack.
NO_VERSION: Final = 0


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """The address of a replica, as the picker names it in ``x-helios-endpoint``."""

    ip: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Reads "ip:port" or "[ip]:port". Raises InvalidRequest where it has another form."""
        host, _, port = text.rpartition(":")
        try:
            ip = ip_address(host.strip("[]"))
        except ValueError as error:
            raise InvalidRequest(f"{text!r} is not ip:port", metadata={"endpoint": text}) from error
        if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise InvalidRequest(f"{text!r} has no port", metadata={"endpoint": text})
        return cls(str(ip), int(port))

    def __str__(self) -> str:
        """Returns the form that Envoy's override_host expects."""
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


@dataclass(frozen=True, slots=True)
class ExpressRoute:
    """A model that Envoy routes by itself: requests for this name go to this endpoint, which has this revision.

    Without an endpoint Envoy picks one, of those that a proxy tells it for the ``model``, the model's own name.
    """

    name: str
    endpoint: Endpoint | None
    revision: str
    model: str


@dataclass(frozen=True, slots=True)
class Push(Generic[Entry]):
    """One response to one stream: all entries, as of a version."""

    nonce: str
    version: int
    entries: frozenset[Entry]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an Envoy says: its (un)subscription, and its answer to a push where ``nonce`` is set."""

    subscribe: bool = False
    unsubscribe: bool = False
    nonce: str = ""
    error: str = ""


@dataclass(slots=True)
class _Stream(Generic[Entry]):
    node: str
    is_subscribed: bool = False
    pending: Push[Entry] | None = None
    settled: int = NO_VERSION
    """Newest version that was answered, by ACK or NACK: older ones are not sent again."""
    acked: int = NO_VERSION


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts for metrics."""

    version: int
    entry_count: int
    envoy_count: int
    push_count: int
    ack_count: int
    nack_count: int


@dataclass(slots=True)
class XdsState(Generic[Entry]):
    """A resource's entries, their version, and what each connected Envoy has acknowledged.

    Versions grow by one with each change; publishing what is published already is no change.
    """

    is_open: bool = False
    version: int = NO_VERSION
    entries: frozenset[Entry] = frozenset()
    _streams: dict[int, _Stream[Entry]] = field(default_factory=dict)
    _ids: "count[int]" = field(default_factory=lambda: count(1))
    _push_count: int = 0
    _ack_count: int = 0
    _nack_count: int = 0

    def publish(self, entries: Iterable[Entry]) -> int:
        """Sets the entries and returns their version. Before ``open`` it is remembered and goes nowhere."""
        wanted = frozenset(entries)
        if wanted != self.entries or self.version == NO_VERSION:
            self.entries = wanted
            self.version += 1
        return self.version

    def open(self) -> None:
        """Lets versions out. Until then Envoys keep what an earlier proxy said: a poorer set would cut them off."""
        self.is_open = True

    def connect(self, node: str) -> int:
        """Adds a stream of an Envoy; returns its id."""
        stream = next(self._ids)
        self._streams[stream] = _Stream(node)
        return stream

    def disconnect(self, stream: int) -> None:
        """Forgets a stream. Idempotent."""
        self._streams.pop(stream, None)

    def handle(self, stream: int, answer: Answer) -> str:
        """Takes in what an Envoy said; returns the error of a NACK, else "". ``next_push`` says what it gets now."""
        entry = self._streams[stream]
        refusal = self._settle(entry, answer) if answer.nonce else ""
        if answer.unsubscribe:
            entry.is_subscribed = False
            entry.pending = None
        if answer.subscribe:
            # A new subscription asks for everything, whatever was acknowledged before.
            entry.is_subscribed = True
            entry.settled = NO_VERSION
        return refusal

    def next_push(self, stream: int) -> Push[Entry] | None:
        """Returns what is to be sent to a stream now, and regards it as sent; None: nothing."""
        entry = self._streams[stream]
        if not (self.is_open and entry.is_subscribed and entry.pending is None and entry.settled < self.version):
            return None
        self._push_count += 1
        entry.pending = Push(f"{stream}-{self._push_count}", self.version, self.entries)
        return entry.pending

    def is_acked(self, version: int, node: str | None = None) -> bool:
        """Returns whether there are Envoys (named ``node``, where given) and all have a version or a newer one."""
        if version > self.version:
            raise Bug("a version that was never published", metadata={"version": str(version)})
        streams = [entry for entry in self._streams.values() if node is None or entry.node == node]
        return bool(streams) and all(entry.acked >= version for entry in streams)

    def lagging(self, version: int) -> frozenset[str]:
        """Returns the nodes of connected Envoys that lack a version."""
        return frozenset(entry.node for entry in self._streams.values() if entry.acked < version)

    def statistics(self) -> Statistics:
        """Returns counts since the start."""
        return Statistics(
            version=self.version,
            entry_count=len(self.entries),
            envoy_count=len(self._streams),
            push_count=self._push_count,
            ack_count=self._ack_count,
            nack_count=self._nack_count,
        )

    def _settle(self, entry: _Stream[Entry], answer: Answer) -> str:
        pending = entry.pending
        if pending is None or answer.nonce != pending.nonce:
            # An answer to a push before an unsubscription: it says nothing about what is wanted now.
            return ""
        entry.pending = None
        entry.settled = pending.version
        if answer.error:
            self._nack_count += 1
            return answer.error
        self._ack_count += 1
        entry.acked = max(entry.acked, pending.version)
        return ""
