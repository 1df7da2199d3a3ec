"""``helios models tag|rollback|history|pin|rm``: what points at the revisions of a model."""

import json
from typing import Any, Final
from uuid import uuid4

from rich.console import Console
from rich.table import Table
from rich.text import Text

from helios.cli.edge import open_admin
from helios.cli.options import NOTHING_DONE
from helios.cli.state import StateDirectory
from helios.cli.transfer_progress import size
from helios.mesh.errors import InvalidRequest
from helios.registry.client import Model, RegistryClient, VersionClient

# As much of a digest as tells revisions apart, and as people copy.
_DIGEST_CHARS: Final = len("sha256:") + 12


async def tag(
    state: StateDirectory,
    console: Console,
    reference: str,
    name: str,
    *,
    is_deleted: bool,
    is_json: bool,
    is_dry_run: bool = False,
) -> None:
    """Points a tag, or the served revision where ``name`` is empty, at a revision; or deletes the tag."""
    async with open_admin(state) as dialer:
        versions = VersionClient(dialer)
        if is_deleted:
            model = await versions.delete_tag(reference, name, request_id=uuid4().hex, is_dry_run=is_dry_run)
        else:
            model = await versions.put_tag(reference, name, request_id=uuid4().hex, is_dry_run=is_dry_run)
    pointer = f"{model.name}@{name}" if name else model.name
    told = f"{pointer} is gone" if is_deleted else f"{pointer} is {short(_pointed(model, name))}"
    _show(console, model, told, is_json=is_json, is_dry_run=is_dry_run)


async def rollback(
    state: StateDirectory, console: Console, pointer: str, *, to: str, is_json: bool, is_dry_run: bool = False
) -> None:
    """Points a tag, or the served revision, where it pointed before."""
    name, tag_name = _pointer(pointer)
    async with open_admin(state) as dialer:
        versions = VersionClient(dialer)
        model = await versions.roll_back(name, tag_name, to=to, request_id=uuid4().hex, is_dry_run=is_dry_run)
    told = f"{pointer} is {short(_pointed(model, tag_name))} again"
    _show(console, model, told, is_json=is_json, is_dry_run=is_dry_run)


async def history(state: StateDirectory, console: Console, pointer: str, *, count: int, is_json: bool) -> None:
    """Lists where a model's served revision and tags have been; of one tag where one is named."""
    name, tag_name = _pointer(pointer)
    async with open_admin(state) as dialer:
        moves = await VersionClient(dialer).list_moves(name, tag=tag_name or None, limit=count)
    if is_json:
        rows = [
            {
                "version": move.version,
                "tag": move.tag,
                "revision": move.revision or "",
                "cause": move.cause.value,
                "actor": move.actor,
                "at": move.at.isoformat(timespec="seconds"),
            }
            for move in moves
        ]
        console.print_json(json.dumps(rows))
        return
    table = Table("when", "pointer", "revision", "cause", box=None)
    for move in moves:
        where = f"{name}@{move.tag}" if move.tag else name
        revision = short(move.revision) if move.revision else "deleted"
        table.add_row(f"{move.at.astimezone():%Y-%m-%d %H:%M:%S}", Text(where), revision, move.cause.value)
    console.print(table)


async def pin(
    state: StateDirectory,
    console: Console,
    reference: str,
    *,
    reason: str,
    is_removed: bool,
    is_json: bool,
    is_dry_run: bool = False,
) -> None:
    """Keeps a revision from being deleted, or takes that back."""
    async with open_admin(state) as dialer:
        versions = VersionClient(dialer)
        if is_removed:
            model = await versions.delete_pin(reference, request_id=uuid4().hex, is_dry_run=is_dry_run)
        else:
            model = await versions.put_pin(reference, reason, request_id=uuid4().hex, is_dry_run=is_dry_run)
    pins = ", ".join(short(one.revision) for one in model.pins) or "nothing"
    _show(console, model, f"{model.name} keeps {pins}", is_json=is_json, is_dry_run=is_dry_run)


async def remove(
    state: StateDirectory,
    console: Console,
    reference: str,
    *,
    is_forced: bool,
    is_json: bool,
    is_dry_run: bool = False,
) -> None:
    """Removes a model, or one revision of it where its digest is named."""
    name, mark, _ = reference.partition("@")
    if mark and is_forced:
        raise InvalidRequest(
            "--force is for whole models; take the revision's tag or pin back", reason="INVALID_ARGUMENT"
        )
    async with open_admin(state) as dialer:
        if mark:
            versions = VersionClient(dialer)
            _, freed = await versions.delete_revision(reference, request_id=uuid4().hex, is_dry_run=is_dry_run)
        else:
            registry = RegistryClient(dialer)
            freed = await registry.delete_model(
                name, is_forced=is_forced, request_id=uuid4().hex, is_dry_run=is_dry_run
            )
    if is_json:
        told = "would_remove" if is_dry_run else "removed"
        console.print_json(json.dumps({told: reference, "freed_bytes": freed}))
    else:
        would = NOTHING_DONE if is_dry_run else ""
        console.print(f"{would}{reference} removed, {size(freed)} freed", markup=False, highlight=False)


def versions_of(model: Model) -> dict[str, Any]:
    """Returns what points at a model's revisions, for JSON."""
    return {
        "model": model.name,
        "served": model.revision.digest,
        "tags": {one.name: one.revision.digest for one in model.tags},
        "pins": {one.revision: one.reason for one in model.pins},
        "rollout": {model.rollout.revision.digest: model.rollout.weight_percent} if model.rollout is not None else {},
        "version": model.version,
    }


def _show(console: Console, model: Model, told: str, *, is_json: bool, is_dry_run: bool) -> None:
    if is_json:
        console.print_json(json.dumps(versions_of(model)))
    else:
        console.print(NOTHING_DONE * is_dry_run + told, markup=False, highlight=False, soft_wrap=True)


def _pointer(text: str) -> tuple[str, str]:
    name, mark, tag_name = text.partition("@")
    if mark and not tag_name:
        raise InvalidRequest(f"after the @ of {text!r} a tag is missing", reason="INVALID_TAG")
    return name, tag_name


def _pointed(model: Model, tag_name: str) -> str:
    return next((one.revision.digest for one in model.tags if one.name == tag_name), model.revision.digest)


def short(digest: str) -> str:
    """Returns as much of a digest as tells revisions apart."""
    return digest[:_DIGEST_CHARS]
