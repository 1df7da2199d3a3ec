"""``helios cache``: what is on this node, and what to do about it.

The cache is the node's, not the mesh's, so the storage agent is called on its own socket in the state directory, with
the identity that operators have there.
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Final

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from helios.cli.certificates import identity_of
from helios.cli.edge import open_admin
from helios.cli.state import StateDirectory, find_running
from helios.mesh.channel import Dialer
from helios.mesh.errors import Corrupted, HeliosError
from helios.registry.client import RegistryClient
from helios.storage.client import CorruptBlob, NodeStatistics, Residency, ScrubProgress, StorageClient

_SHOWN_DIGEST: Final = len("sha256:") + 12


async def status(state: StateDirectory, console: Console, *, is_json: bool) -> None:
    """Shows the tiers, what they did, and the revisions in them."""
    async with _open_storage(state) as storage:
        residency, counted = await storage.residency(), await storage.statistics()
    if is_json:
        fields = {
            "tiers": [asdict(tier) for tier in counted.tiers],
            "miss_count": counted.miss_count,
            "revisions": [asdict(revision) for revision in residency.revisions],
        }
        console.print_json(json.dumps(fields))
        return
    console.print(_tier_table(counted))
    console.print(_revision_table(residency, await _names(state)))


async def evict(state: StateDirectory, console: Console, name: str, *, is_json: bool) -> None:
    """Drops a revision from the node."""
    revision = await _revision_of(state, name)
    async with _open_storage(state) as storage:
        freed_bytes = await storage.evict(revision)
    if is_json:
        console.print_json(json.dumps({"revision": revision, "freed_bytes": freed_bytes}))
    else:
        console.print(f"{revision[:_SHOWN_DIGEST]}: {decimal(freed_bytes)} freed; the registry keeps the model")


async def pin(state: StateDirectory, console: Console, name: str, *, is_pinned: bool, is_json: bool) -> None:
    """Pins a revision to the node, or takes the pin back."""
    revision = await _revision_of(state, name)
    async with _open_storage(state) as storage:
        await (storage.pin(revision) if is_pinned else storage.unpin(revision))
    if is_json:
        console.print_json(json.dumps({"revision": revision, "pinned": is_pinned}))
        return
    console.print(f"{revision[:_SHOWN_DIGEST]}: {'stays once it is here' if is_pinned else 'may be evicted'}")


async def scrub(state: StateDirectory, console: Console, *, bytes_per_second: int | None, is_json: bool) -> None:
    """Compares every blob with its name.

    Raises:
        Corrupted: BLOBS_CORRUPT, when some were bad, whether or not they were mended.
    """
    last = ScrubProgress(0, 0, ())
    async with _open_storage(state) as storage:
        with _progress(console, is_shown=not is_json) as progress:
            task = progress.add_task("scrub", total=None)
            async for last in storage.scrub(bytes_per_second=bytes_per_second):
                progress.update(task, completed=last.done_bytes, total=last.total_bytes)
    if is_json:
        console.print_json(json.dumps(asdict(last)))
        if last.corrupt:
            raise SystemExit(1)
        return
    for blob in last.corrupt:
        console.print(f"{blob.hash} in {blob.tier}: {_fate(blob)}", soft_wrap=True)
    if last.corrupt:
        raise Corrupted(f"{len(last.corrupt)} blob(s) were not what their name says", reason="BLOBS_CORRUPT")
    console.print(f"{decimal(last.done_bytes)} read, all good")


@asynccontextmanager
async def _open_storage(state: StateDirectory) -> AsyncIterator[StorageClient]:
    find_running(state)
    target = f"unix:{state.sockets / 'storage.sock'}"
    async with Dialer(target, identity=identity_of(state, "admin-edge"), peer="storage") as dialer:
        yield StorageClient(dialer)


async def _revision_of(state: StateDirectory, name: str) -> str:
    if name.startswith("sha256:"):
        return name
    async with open_admin(state) as dialer:
        return (await RegistryClient(dialer).get_model(name)).revision.digest


async def _names(state: StateDirectory) -> Mapping[str, str]:
    """Which model each revision is of, as far as it is a model's newest; nothing while the registry is away."""
    try:
        async with open_admin(state) as dialer:
            models = await RegistryClient(dialer).list_models()
    except HeliosError:
        return {}
    return {model.revision.digest: model.name for model in models}


def _tier_table(counted: NodeStatistics) -> Table:
    table = Table("TIER", "KIND", "USED", "CAPACITY", "FREE", "HITS", "READ/S", "WRITE/S", "EVICTED", box=box.SIMPLE)
    lent_count = counted.miss_count + sum(tier.hit_count for tier in counted.tiers)
    for tier in counted.tiers:
        table.add_row(
            tier.tier.name,
            tier.tier.kind,
            decimal(tier.tier.used_bytes),
            decimal(tier.tier.capacity_bytes) if tier.tier.capacity_bytes else "the disk",
            decimal(tier.free_bytes),
            f"{tier.hit_count} of {lent_count}",
            _rate(tier.read_bytes_per_second),
            _rate(tier.write_bytes_per_second),
            ", ".join(f"{count} {reason}" for reason, count in sorted(tier.evicted_count.items())) or "0",
        )
    return table


def _revision_table(residency: Residency, names: Mapping[str, str]) -> Table:
    table = Table("REVISION", "MODEL", "SIZE", "TIERS", "LEASES", "PINNED", box=box.SIMPLE)
    for revision in residency.revisions:
        tiers = ", ".join(revision.tiers) + (f" → {revision.moving_to}" if revision.moving_to else "")
        table.add_row(
            revision.revision[:_SHOWN_DIGEST],
            names.get(revision.revision, ""),
            decimal(revision.size_bytes),
            tiers,
            str(revision.lease_count),
            "yes" if revision.is_pinned else "",
        )
    return table


def _rate(bytes_per_second: float) -> str:
    return decimal(round(bytes_per_second)) if bytes_per_second else "not measured"


def _fate(blob: CorruptBlob) -> str:
    if blob.is_healed:
        return "a good copy took its place; replicas that run keep the pages they have, restart them"
    return "gone; its leases ended" if blob.is_lent else "gone; it is fetched again when it is wanted"


def _progress(console: Console, *, is_shown: bool) -> Progress:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not is_shown, transient=True)
