"""``helios models add`` and ``pull``: one ingest, from this machine or from a place that is reached by a network."""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from helios.cli.edge import open_admin
from helios.cli.models_follow import Manner, follow_new
from helios.cli.models_set import changed_settings
from helios.cli.state import StateDirectory
from helios.cli.transfer_progress import ProgressBar, ProgressLines, size
from helios.mesh.errors import AlreadyExists, InvalidRequest, ModelNotFound
from helios.registry.client import IngestDone, IngestProgress, IngestSpec, RegistryClient, Wish
from helios.registry.sources.reference import HubReference, OciReference, parse_reference, place_of, suggest_name

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
        follow: How its source is followed from then on; None: it is not.
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
    follow: Manner | None = None


async def models_add(state: StateDirectory, console: Console, wanted: Addition, *, is_json: bool = False) -> None:
    """Adds a model, or a new revision of one; shows how far it is.

    Ctrl-C gives it up. What was downloaded by then, and not yet being stored, is kept for a day, and the same command
    goes on with it.
    """
    source = resolve(wanted)
    # Before hours of downloading, not after them.
    wish = wanted.follow.apply(Wish(source, wanted.include, wanted.exclude)).check() if wanted.follow else None
    name = suggest_name(source) if wanted.name is None else wanted.name
    async with open_admin(state) as dialer:
        registry = RegistryClient(dialer)
        if wanted.name is None:
            await _require_same_place(registry, name, source)
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
        if wish is not None:
            await follow_new(dialer, name, wish)


async def _require_same_place(registry: RegistryClient, name: str, source: str) -> None:
    """Raises AlreadyExists where a name that nobody has typed is that of a model from elsewhere."""
    try:
        model = await registry.get_model(name)
    except ModelNotFound:
        return
    if place_of(model.revision.source) != place_of(source):
        raise AlreadyExists(
            f"the name {name} is taken by a model from {model.revision.source}; choose another one with --name, or give"
            f" --name {name} to make this its new revision",
            reason="NAME_TAKEN",
        )


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


class Bar(ProgressBar):
    """An ingest's progress for people."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, phase="inspect")

    def done(self, name: str, event: IngestDone) -> None:
        """Says what came of it."""
        revision = event.model.revision
        licence = f", licence {revision.profile.license}" if revision.profile.license else ""
        self.say(
            f"{name} is {revision.digest[:19]}…, {size(event.new_bytes)} new{licence}; the first request starts it"
        )


class Lines(ProgressLines):
    """An ingest's progress for programs; the last line is ``done``."""

    def done(self, name: str, event: IngestDone) -> None:
        """Writes what came of it."""
        revision = event.model.revision
        self.write(
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
