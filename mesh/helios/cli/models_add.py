"""``helios models add`` and ``pull``: one ingest, from this machine or from a place that is reached by a network."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from helios.cli.edge import open_admin
from helios.cli.models_set import changed_settings
from helios.cli.state import StateDirectory
from helios.mesh.errors import InvalidRequest
from helios.registry.client import IngestDone, IngestProgress, IngestSpec, RegistryClient
from helios.registry.sources.reference import HubReference, OciReference, parse_reference, suggest_name

_EMBEDDED = "embedded:"


@dataclass(frozen=True, slots=True)
class Addition:
    """What is to be added.

    Attributes:
        name: Name of the model; None: taken from the source.
        source: A path of this machine, ``embedded:NAME``, or any other source.
        revision: Branch, tag or commit of a hub's repository, tag of an OCI registry's.
        assignments: ``FIELD=VALUE`` of engine settings.
        tags: To point at the revision.
        keep_served: A model that exists goes on serving what it serves.
    """

    name: str | None
    source: str
    revision: str = ""
    aliases: tuple[str, ...] = ()
    sha256: str = ""
    assignments: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    keep_served: bool = False


async def models_add(state: StateDirectory, console: Console, wanted: Addition, *, is_json: bool = False) -> None:
    """Adds a model, or a new revision of one; shows how far it is.

    Ctrl-C gives it up. What was downloaded by then, and not yet being stored, is kept for a day, and the same command
    goes on with it.
    """
    source = resolve(wanted)
    name = suggest_name(source) if wanted.name is None else wanted.name
    async with open_admin(state) as dialer:
        registry = RegistryClient(dialer)
        settings = await changed_settings(registry, name, wanted.assignments) if wanted.assignments else None
        with Lines(console) if is_json else Bar(console) as shown:
            spec = IngestSpec(
                name,
                source,
                aliases=wanted.aliases,
                expected_sha256=wanted.sha256,
                engine_settings=settings,
                include=wanted.include,
                exclude=wanted.exclude,
                tags=wanted.tags,
                keep_served=wanted.keep_served,
            )
            async for event in registry.ingest_spec(spec):
                if isinstance(event, IngestProgress):
                    shown.progress(event)
                else:
                    shown.done(*reached(wanted, name, event))


def reached(wanted: Addition, name: str, done: IngestDone) -> tuple[str, IngestDone]:
    """Returns what reaches the new revision, a tag where the model serves another, and the result with that one."""
    tag = next((one for one in done.model.tags if wanted.keep_served and one.name in wanted.tags), None)
    if tag is None:
        return name, done
    return f"{name}@{tag.name}", replace(done, model=replace(done.model, revision=tag.revision))


def resolve(wanted: Addition) -> str:
    """Returns the source as the registry takes it. Raises InvalidRequest (INVALID_SOURCE)."""
    reference = parse_reference(wanted.source)
    if wanted.revision:
        match reference:
            case HubReference(revision=""):
                return f"{wanted.source}@{wanted.revision}"
            case OciReference(tag="", digest=""):
                separator = "@" if wanted.revision.startswith("sha256:") else ":"
                return f"{wanted.source}{separator}{wanted.revision}"
        raise InvalidRequest(
            f"--revision is for hf:, ms: and oci: sources that don't name one; {wanted.source!r} is none",
            reason="INVALID_SOURCE",
        )
    if reference is not None:
        return str(reference) if isinstance(reference, HubReference) else wanted.source
    if wanted.source.startswith(_EMBEDDED):
        return wanted.source
    path = Path(wanted.source).expanduser().absolute()
    if not path.exists():
        raise InvalidRequest(
            f"{path} does not exist; sources elsewhere begin with hf:, ms:, https://, s3://, gs://, az:// or oci://",
            reason="INVALID_SOURCE",
        )
    return str(path)


class Bar:
    """Progress for people: the rate and the time left are the registry's own."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            _Rate(),
            _Remaining(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("inspect", total=None, rate=0.0, remaining=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def progress(self, event: IngestProgress) -> None:
        self._bar.update(
            self._task,
            description=event.phase,
            completed=event.done_bytes,
            total=event.total_bytes or None,
            rate=event.bytes_per_second,
            remaining=event.remaining_seconds,
        )

    def refresh(self) -> None:
        self._bar.refresh()

    def done(self, name: str, event: IngestDone) -> None:
        revision = event.model.revision
        licence = f", licence {revision.profile.license}" if revision.profile.license else ""
        text = f"{name} is {revision.digest[:19]}…, {size(event.new_bytes)} new{licence}; the first request starts it"
        self._console.print(text, highlight=False)


class Lines:
    """Progress for programs: a JSON object a line, the last one with ``done``."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def progress(self, event: IngestProgress) -> None:
        self._write(
            {
                "phase": event.phase,
                "done_bytes": event.done_bytes,
                "total_bytes": event.total_bytes,
                "bytes_per_second": round(event.bytes_per_second),
                "remaining_seconds": None if event.remaining_seconds is None else round(event.remaining_seconds, 1),
            }
        )

    def done(self, name: str, event: IngestDone) -> None:
        revision = event.model.revision
        self._write(
            {
                "done": {
                    "model": name,
                    "revision": revision.digest,
                    "source": revision.source,
                    "size_bytes": revision.size_bytes,
                    "new_bytes": event.new_bytes,
                    "license": revision.profile.license,
                    "architecture": revision.profile.architecture,
                }
            }
        )

    def _write(self, document: dict[str, object]) -> None:
        self._console.file.write(json.dumps(document) + "\n")
        self._console.file.flush()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate: float = task.fields["rate"]
        return Text(f"{size(rate)}/s" if rate else "", style="progress.data.speed")


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        seconds: float | None = task.fields["remaining"]
        if seconds is None:
            return Text("")
        minutes, rest = divmod(round(seconds), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{rest:02}", style="progress.remaining")


def size(count: float) -> str:
    """Returns bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
