"""The supervisor's list of its running replicas on disk: what a successor must find again, or kill.

Hellos rebuild the ledger; the list says how many to wait for, and names the trees of those that never come back (a
replica that hangs says no hello). A torn or foreign file is worth no more than none, since replicas drain by
themselves when nobody takes them over: reading never fails.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import structlog

from helios.worker.replica.adapter_state import AdapterState, AdapterStatus
from helios.worker.replica.settings import EngineSettings, LoraAdapter
from helios.worker.supervisor.records import (
    MemoryItem,
    MemoryKind,
    Order,
    PhaseTiming,
    ProcessIdentity,
    ReplicaState,
    ReplicaView,
)

log = structlog.get_logger()

_FORMAT: Final = 3
_ITEMS: Final = ("memory_items", "host_memory_items")


@dataclass(frozen=True, slots=True)
class ListedReplica:
    """A replica with a process, and the port that it was given."""

    view: ReplicaView
    port: int


class ReplicaList:
    """The file. ``write`` is atomic: a reader sees the old list or the new one.

    ``boot_id`` names this boot of the machine: pids of another boot are worth nothing and may be somebody else's.
    """

    def __init__(self, path: Path, boot_id: str) -> None:
        self._path = path
        self._boot_id = boot_id

    def read(self) -> tuple[ListedReplica, ...]:
        """Returns the list of this boot; empty where there is none that can be read."""
        try:
            document = json.loads(self._path.read_text())
            if document["format"] != _FORMAT or document["boot_id"] != self._boot_id:
                log.info("list of replicas is of another boot or version", path=str(self._path))
                return ()
            return tuple(_from_json(entry) for entry in document["replicas"])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("list of replicas can't be read", path=str(self._path), error=repr(error))
            return ()

    def write(self, replicas: Sequence[ListedReplica]) -> None:
        """Replaces the list. Raises OSError where the disk refuses.

        In the event loop, not in a thread: some kilobytes without fsync take a tenth of a millisecond, and a thread
        would go on writing an older list when its task is cancelled.
        """
        document = {
            "format": _FORMAT,
            "boot_id": self._boot_id,
            "replicas": [_to_json(replica) for replica in replicas if replica.view.process is not None],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        # No fsync: the list is of use only while its processes live, and those do not outlive the machine's crash.
        temporary.write_text(json.dumps(document, indent=1))
        temporary.replace(self._path)


def _to_json(replica: ListedReplica) -> dict[str, Any]:
    view = replica.view
    assert view.process is not None
    order = {**asdict(view.order), "created_at": view.order.created_at.isoformat()}
    for name in _ITEMS:
        order[name] = [(item.kind.value, item.size_bytes) for item in getattr(view.order, name)]
    return {
        "order": order,
        "state": view.state.value,
        "address": view.address,
        "process": asdict(view.process),
        "phases": [asdict(phase) for phase in view.phases],
        "max_context_tokens": view.max_context_tokens,
        "lease_id": view.lease_id,
        "device_ids": view.device_ids,
        "can_sleep": view.can_sleep,
        "wake_count": view.wake_count,
        "sleeping_bytes": view.sleeping_bytes,
        "adapters": [{**asdict(status), "state": status.state.value} for status in view.adapters],
        "port": replica.port,
    }


def _from_json(entry: dict[str, Any]) -> ListedReplica:
    order = dict(entry["order"])
    order["created_at"] = datetime.fromisoformat(order["created_at"])
    for name in _ITEMS:
        order[name] = tuple(MemoryItem(MemoryKind(kind), size) for kind, size in order.get(name, ()))
    order["device_ids"] = tuple(order["device_ids"])
    order["served_names"] = tuple(order["served_names"])
    order["settings"] = EngineSettings.from_document(order["settings"])
    view = ReplicaView(
        order=Order(**order),
        state=ReplicaState(entry["state"]),
        address=str(entry["address"]),
        process=ProcessIdentity(**entry["process"]),
        phases=tuple(PhaseTiming(**phase) for phase in entry["phases"]),
        max_context_tokens=int(entry["max_context_tokens"]),
        lease_id=str(entry["lease_id"]),
        device_ids=tuple(entry["device_ids"]),
        can_sleep=bool(entry["can_sleep"]),
        wake_count=int(entry["wake_count"]),
        sleeping_bytes=entry["sleeping_bytes"],
        adapters=tuple(map(_adapter_from_json, entry.get("adapters", ()))),
    )
    return ListedReplica(view, int(entry["port"]))


def _adapter_from_json(entry: dict[str, Any]) -> AdapterStatus:
    adapter, state = LoraAdapter(**entry["adapter"]), AdapterState(entry["state"])
    return AdapterStatus(adapter, state, str(entry["reason"]), str(entry["message"]))
