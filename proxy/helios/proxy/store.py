"""What a proxy remembers over a restart: the catalogue, workers, cordons, swaps, starts, decisions, usage, keys.

Each file is written whole to a temporary name, synced and renamed, so a reader, or the next start after a crash, finds
the old or the new one. A file that can't be read counts as absent: it is a copy, the registry and the workers have the
truth, and a model that can't be compiled is tried again.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import orjson
import structlog

from helios.mesh.files import write_private
from helios.mesh.routing import ModelRouting
from helios.proxy.activation.rungs import RungEstimates
from helios.proxy.admission.keyring import Caller
from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.scaling.decisions import Scaled, scaled_of
from helios.proxy.scaling.policy import Scaling
from helios.proxy.swap import SwapFailures

log = structlog.get_logger()

# Changes come in bursts (an ingest, a snapshot); one write takes them all.
_SETTLE_SECONDS: Final = 0.25
_TUPLES: Final = ("aliases", "tensor_parallel_options", "pipeline_parallel_options")
_FIELDS: Final = frozenset(field.name for field in fields(ModelEntry))


class Store:
    """Files in a directory. `run` must be running for the catalogue to be written."""

    def __init__(self, directory: Path, catalogue: Catalogue) -> None:
        """Makes the directory, for its owner only, where it does not exist."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._models = directory / "catalogue.json"
        self._workers = directory / "workers.json"
        self._swaps = directory / "swaps.json"
        self._usage = directory / "usage.json"
        self._starts = directory / "starts.json"
        self._decisions = directory / "decisions.json"
        self._cordons = directory / "cordons.json"
        self._keys = directory / "keys.json"
        self._catalogue = catalogue
        self._changed = asyncio.Event()

    def mark_changed(self) -> None:
        """Has the catalogue written soon."""
        self._changed.set()

    async def run(self) -> None:
        """Writes the catalogue whenever it changed, until cancelled. Raises OSError."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_SETTLE_SECONDS)
            self._changed.clear()
            await self.write_models()

    async def write_models(self) -> None:
        """Writes the catalogue now. Raises OSError."""
        await asyncio.to_thread(_write, self._models, self._catalogue.models())

    async def save(self, worker_ids: frozenset[str]) -> None:
        """Remembers the workers."""
        await asyncio.to_thread(_write, self._workers, sorted(worker_ids))

    async def save_cordons(self, own: Iterable[str], shared: Iterable[str]) -> None:
        """Remembers the cordoned workers: those that only this proxy knows of, and those of the registry."""
        await asyncio.to_thread(_write, self._cordons, [{"own": sorted(own), "shared": sorted(shared)}])

    async def save_swap_failures(self, failures: Sequence[SwapFailures]) -> None:
        """Remembers which models' compiled replicas failed, and how often."""
        await asyncio.to_thread(_write, self._swaps, failures)

    async def save_decisions(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Remembers why models have as many replicas as they have. Raises OSError."""
        await asyncio.to_thread(_write, self._decisions, documents)

    async def save_starts(self, document: Mapping[str, Any]) -> None:
        """Remembers what starts took. Raises OSError."""
        await asyncio.to_thread(_write, self._starts, [document])

    async def save_keys(self, keys: Sequence[tuple[bytes, Caller]]) -> None:
        """Remembers API keys, by their hashes."""
        rows = [{"sha256": sha256.hex(), **caller.as_fields()} for sha256, caller in keys]
        await asyncio.to_thread(_write, self._keys, rows)

    async def save_usage(self, document: Mapping[str, Any]) -> None:
        """Remembers usage that the registry has not got. Raises OSError."""
        await asyncio.to_thread(_write, self._usage, [document])


def load_models(directory: Path) -> list[ModelEntry]:
    """The catalogue of an earlier run; empty where there is none."""
    document = _read(directory / "catalogue.json")
    if not isinstance(document, list):
        return []
    try:
        return [_entry(item) for item in document]
    except (TypeError, AttributeError) as error:
        log.warning("catalogue on disk can't be used", error=str(error))
        return []


def load_workers(directory: Path) -> list[str]:
    """The workers of an earlier run; empty where there was none."""
    return _read_names(directory / "workers.json")


def load_cordons(directory: Path) -> tuple[list[str], list[str]]:
    """The workers that an earlier run was told to start nothing on: its own cordons, and the registry's.

    Before cordons were shared, the file was a list of names.
    """
    document = _read(directory / "cordons.json")
    if isinstance(document, list) and document and isinstance(document[0], dict):
        return [str(name) for name in document[0].get("own", ())], [str(name) for name in document[0].get("shared", ())]
    return [str(name) for name in document] if isinstance(document, list) else [], []


def load_swap_failures(directory: Path) -> list[SwapFailures]:
    """What an earlier run counted; empty where there was none."""
    document = _read(directory / "swaps.json")
    if not isinstance(document, list):
        return []
    try:
        return [SwapFailures(**{**item, "failure_count": int(item["failure_count"])}) for item in document]
    except (KeyError, TypeError, ValueError) as error:
        log.warning("failed swaps on disk can't be used", error=str(error))
        return []


def load_keys(directory: Path) -> list[tuple[bytes, Caller]] | None:
    """The API keys of an earlier run; None where there was none."""
    document = _read(directory / "keys.json")
    if not isinstance(document, list):
        return None
    try:
        return [(bytes.fromhex(item.pop("sha256")), Caller.of_fields(item)) for item in document]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        log.warning("keys on disk can't be used", error=str(error))
        return None


def load_decisions(directory: Path, wall_offset: float) -> list[Scaled]:
    """What an earlier run decided, the oldest first; the clock since 1970 is `wall_offset` ahead of this run's."""
    document = _read(directory / "decisions.json")
    if not isinstance(document, list):
        return []
    try:
        return [scaled_of(item, wall_offset) for item in document]
    except (KeyError, TypeError, ValueError) as error:
        log.warning("decisions on disk can't be used", error=str(error))
        return []


def load_starts(directory: Path, estimates: RungEstimates) -> None:
    """Has estimates go on with what an earlier run had measured."""
    document = _read(directory / "starts.json")
    if not isinstance(document, list) or not document:
        return
    try:
        estimates.restore(document[0])
    except ValueError as error:
        log.warning("starts on disk can't be used", error=str(error))


def load_usage(directory: Path) -> object:
    """The usage that an earlier run could not report; None where there is none."""
    document = _read(directory / "usage.json")
    return document[0] if isinstance(document, list) and document else None


def _entry(item: dict[str, Any]) -> ModelEntry:
    known = {key: value for key, value in item.items() if key in _FIELDS}
    scaling = Scaling.of_fields(known["scaling"]) if known.get("scaling") else None
    routing = ModelRouting.of_fields(known.get("routing") or {})
    tuples = {name: tuple(known.get(name, ())) for name in _TUPLES}
    return ModelEntry(**{**known, "scaling": scaling, "routing": routing, **tuples})


def _read_names(path: Path) -> list[str]:
    document = _read(path)
    return [str(item) for item in document] if isinstance(document, list) else []


def _read(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, orjson.JSONDecodeError) as error:
        log.warning("file can't be read", path=str(path), error=str(error))
        return None


def _write(path: Path, value: Sequence[Any]) -> None:
    items = [asdict(item) if isinstance(item, ModelEntry | SwapFailures) else item for item in value]
    write_private(path, orjson.dumps(items))
