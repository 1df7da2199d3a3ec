"""Models, revisions, aliases and policies in SQL. Each method is one transaction; afterwards a name means one thing.

The store knows which blobs are referenced, not the files; ``catalog`` orders its writes, tells watchers, and lets the
blob store delete what nothing refers to any more. Tags, pins and history are ``tag_store``'s. Time is passed in.
"""

import dataclasses
import json
from collections.abc import Collection
from datetime import datetime
from typing import Protocol

from sqlalchemy import delete, func, insert, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.mesh.errors import AlreadyExists, NotFound, PreconditionFailed, RevisionNotFound
from helios.registry.blob_rows import BlobRows, batches, delete_unused_revisions
from helios.registry.changes import DEFAULT_KEPT_EVENTS, ChangeLog, Write, changed_since, read_version
from helios.registry.database import Database, upsert
from helios.registry.engine_settings import EngineSettings, refuse
from helios.registry.events import PLAIN, EventKind, Mutation
from helios.registry.history import Cause
from helios.registry.manifest import Digest, Entry, Manifest
from helios.registry.model_rows import (
    alias_target,
    find_model,
    is_model,
    no_model,
    require_model,
    require_revision,
    resolve,
    revision_of,
    select_models,
)
from helios.registry.moments import to_us
from helios.registry.names import Reference
from helios.registry.pointers import move_pointer
from helios.registry.policy import ModelPolicy
from helios.registry.profile import ModelProfile
from helios.registry.records import (
    Model,
    ModelChange,
    ModelDeleted,
    ModelSnapshot,
    ModelUpserted,
    ResolvedModel,
    Revision,
)
from helios.registry.tables import (
    aliases,
    blobs,
    conversions,
    entries,
    model_revisions,
    models,
    pins,
    revisions,
)

__all__ = ["Guard", "NewRevision", "Store"]

# What requests that put models are remembered as.
_PUT = "put_model"


class Guard(Protocol):
    """A condition of a write, looked at in its transaction. Guards that mean the same are equal."""

    async def require(self, connection: AsyncConnection) -> None:
        """Raises HeliosError where it does not hold; the write changes nothing then."""


@dataclasses.dataclass(frozen=True, slots=True)
class NewRevision:
    """What an ingest found: a manifest whose blobs are all on disk.

    Attributes:
        converted_from: sha256 of the source file and the converter's version, where the files are a conversion's.
        engine_settings: The model's from now on; None: it keeps those it has.
        tags: They point at it from now on.
        is_served: The model serves it from now on; False: a model that serves another one goes on with that.
        asked: What the ingest was asked for, by which a ``request_id`` is known again; empty: this revision.
        guard: What must hold when it is written; None: nothing.
    """

    manifest: Manifest
    profile: ModelProfile
    source: str
    converted_from: tuple[str, str] | None = None
    engine_settings: EngineSettings | None = None
    tags: tuple[str, ...] = ()
    is_served: bool = True
    asked: str = ""
    guard: Guard | None = None


class Store:
    """The registry's tables as operations."""

    def __init__(self, database: Database, *, kept_events: int = DEFAULT_KEPT_EVENTS) -> None:
        self._database = database
        self.blobs = BlobRows(database)
        self.changes = ChangeLog(database, kept_events=kept_events)

    async def list_models(self, *, after: str = "", limit: int | None = None) -> list[Model]:
        """Returns models by name, from the first after ``after``; all where ``limit`` is None."""
        async with self._database.snapshot() as connection:
            return await select_models(connection, models.c.name > after, limit=limit)

    async def snapshot(self) -> ModelSnapshot:
        """Returns all models, and the number of the last change that they show."""
        async with self._database.snapshot() as connection:
            version = await read_version(connection)
            return ModelSnapshot(tuple(await select_models(connection, models.c.name > "")), version)

    async def changes_since(self, version: int) -> list[ModelChange] | None:
        """Returns the models that changed after a number, as they are now; None where that is not known any more.

        A watcher that was told of some of them may go on after the number that the last of these carries.
        """
        async with self._database.snapshot() as connection:
            since = await changed_since(connection, version)
            if since is None:
                return None
            found: list[ModelChange] = []
            for name in since.models:
                told = since.version if name == since.models[-1] else version
                changed = await select_models(connection, models.c.name == name)
                found.append(ModelUpserted(changed[0], told) if changed else ModelDeleted(name, told))
            return found

    async def count_models(self) -> int:
        """Returns how many models there are."""
        async with self._database.snapshot() as connection:
            return (await connection.execute(select(func.count()).select_from(models))).scalar_one()

    async def get_model(self, name: str) -> Model:
        """Returns a model by name or alias. Raises ModelNotFound."""
        async with self._database.snapshot() as connection:
            return await find_model(connection, name)

    async def resolve(self, reference: Reference) -> ResolvedModel:
        """Returns the model and the revision that a reference means.

        Raises:
            ModelNotFound: No such model.
            NotFound: TAG_NOT_FOUND.
            RevisionNotFound: It has no revision that begins so.
            InvalidRequest: AMBIGUOUS_REVISION.
        """
        async with self._database.snapshot() as connection:
            model = await find_model(connection, reference.name)
            revision = await require_revision(connection, model, reference)
            return ResolvedModel(model, revision, reference.tag)

    async def check_names(self, name: str, new_aliases: Collection[str]) -> None:
        """Raises AlreadyExists (ALIAS_TAKEN) if an ingest could not give a model this name and these aliases."""
        async with self._database.snapshot() as connection:
            await _check_names(connection, name, new_aliases)

    async def find_put(self, name: str, asked: str, mutation: Mutation) -> Model | None:
        """Returns the model, as it is now, if ``put_model`` carried this request out before. Raises as it does then."""
        if not await self.changes.is_known(mutation, _PUT, name, asked):
            return None
        async with self._database.snapshot() as connection:
            return await require_model(connection, name)

    async def put_model(
        self,
        name: str,
        new_aliases: Collection[str],
        revision: NewRevision,
        now: datetime,
        mutation: Mutation = PLAIN,
    ) -> Model:
        """Gives a model a revision, which it serves from then on; makes the model if it is not there. Idempotent.

        Raises:
            AlreadyExists: ALIAS_TAKEN, when the name is an alias, or an alias names another model or is a model.
            InvalidRequest: INVALID_ENGINE_SETTINGS, as ``update_engine_settings``.
            PreconditionFailed: TOO_MANY_TAGS.
            Conflict: STALE_VERSION.
            ModelNotFound: The request was carried out before, and the model is gone.
            HeliosError: As the guard.
        """
        digest = revision.manifest.digest()
        async with self.changes.write(mutation, now, _PUT, name, revision.asked or digest) as write:
            connection = write.connection
            if write.is_repeat:
                return await require_model(connection, name)
            if revision.guard is not None:
                await revision.guard.require(connection)
            await write.require_version(name)
            await _check_names(connection, name, new_aliases)
            await _insert_revision(connection, digest, revision, now)
            is_new = await _ensure_model(write, name, digest)
            if revision.engine_settings is not None:
                await _set_engine_settings(write, name, revision.engine_settings)
            if await _add_to_history(connection, name, digest, is_served=revision.is_served or is_new):
                await write.record(EventKind.REVISION_ADDED, name, revision=digest)
            if revision.is_served or is_new:
                await move_pointer(write, name, "", digest, Cause.INGEST)
            for tag in revision.tags:
                await move_pointer(write, name, tag, digest, Cause.INGEST)
            for alias in new_aliases:
                await _put_alias(write, alias, name)
            return await require_model(connection, name)

    async def delete_model(
        self, name: str, now: datetime, mutation: Mutation = PLAIN, *, is_forced: bool
    ) -> dict[str, int]:
        """Removes a model, its aliases, tags and history, and the revisions that no other model has.

        Returns:
            Hash and size of the blobs that nothing refers to since.

        Raises:
            ModelNotFound: No model has this name.
            PreconditionFailed: MODEL_IN_USE, unless forced: a revision is pinned, or another model's engine settings
                name it.
            Conflict: STALE_VERSION.
        """
        async with self.changes.write(mutation, now, "delete_model", name, str(is_forced)) as write:
            if write.is_repeat:
                return {}
            connection = write.connection
            await write.require_version(name)
            if not await is_model(connection, name):
                raise no_model(name)
            if not is_forced:
                await _refuse_used(connection, name)
            theirs = select(model_revisions.c.revision).where(model_revisions.c.model == name)
            had = (await connection.execute(theirs)).scalars().all()
            await connection.execute(delete(models).where(models.c.name == name))
            await write.record(EventKind.MODEL_DELETED, name)
            return await delete_unused_revisions(connection, had)

    async def list_revisions(self, name: str, *, before: int | None, limit: int) -> list[tuple[int, Revision]]:
        """Returns a model's revisions, newest first, with the ordinal to continue from. Raises ModelNotFound."""
        async with self._database.snapshot() as connection:
            model = await resolve(connection, name)
            query = (
                select(model_revisions.c.ordinal, *revisions.c)
                .join(revisions, revisions.c.digest == model_revisions.c.revision)
                .where(model_revisions.c.model == model)
                .order_by(model_revisions.c.ordinal.desc())
                .limit(limit)
            )
            if before is not None:
                query = query.where(model_revisions.c.ordinal < before)
            return [(row.ordinal, revision_of(row)) for row in await connection.execute(query)]

    async def get_manifest(self, digest: str) -> tuple[Manifest, Revision]:
        """Returns a revision and its manifest. Raises RevisionNotFound."""
        async with self._database.snapshot() as connection:
            row = (await connection.execute(select(revisions).where(revisions.c.digest == digest))).one_or_none()
            if row is None:
                raise RevisionNotFound(f"there is no revision {digest}", metadata={"revision": digest})
            query = (
                select(entries.c.path, entries.c.media_type, blobs.c.hash, blobs.c.size_bytes)
                .join(blobs, blobs.c.hash == entries.c.blob)
                .where(entries.c.revision == digest)
            )
            found = [
                Entry(entry.path, Digest(entry.hash, entry.size_bytes), entry.media_type)
                for entry in await connection.execute(query)
            ]
            return Manifest.of(found), revision_of(row)

    async def find_conversion(self, source_sha256: str, converter: str) -> str | None:
        """Returns the revision that a file became with this converter, None if it was not converted yet."""
        query = select(conversions.c.revision).where(
            conversions.c.source_sha256 == source_sha256, conversions.c.converter == converter
        )
        async with self._database.snapshot() as connection:
            found: str | None = (await connection.execute(query)).scalar_one_or_none()
            return found

    async def put_alias(self, alias: str, model: str, now: datetime, mutation: Mutation = PLAIN) -> Model:
        """Makes an alias point at a model; returns that model.

        Raises:
            ModelNotFound: No model has the name ``model``.
            AlreadyExists: MODEL_EXISTS, a model has the name ``alias``.
            Conflict: STALE_VERSION, of ``model``.
        """
        async with self.changes.write(mutation, now, "put_alias", alias, model) as write:
            if not write.is_repeat:
                await write.require_version(model)
                if not await is_model(write.connection, model):
                    raise no_model(model)
                if await is_model(write.connection, alias):
                    raise AlreadyExists(
                        f"{alias!r} is a model; an alias can't have its name",
                        reason="MODEL_EXISTS",
                        metadata={"alias": alias},
                    )
                await _put_alias(write, alias, model)
            return await require_model(write.connection, model)

    async def delete_alias(self, alias: str, now: datetime, mutation: Mutation = PLAIN) -> None:
        """Removes an alias. Raises NotFound (ALIAS_NOT_FOUND), Conflict (STALE_VERSION, of its model)."""
        async with self.changes.write(mutation, now, "delete_alias", alias) as write:
            if write.is_repeat:
                return
            model = await alias_target(write.connection, alias)
            if model is None:
                raise NotFound(f"there is no alias {alias!r}", reason="ALIAS_NOT_FOUND", metadata={"alias": alias})
            await write.require_version(model)
            await write.connection.execute(delete(aliases).where(aliases.c.alias == alias))
            await write.record(EventKind.ALIAS_REMOVED, model, alias=alias)

    async def update_policy(self, name: str, policy: ModelPolicy, now: datetime, mutation: Mutation = PLAIN) -> Model:
        """Sets a model's policy, by name or alias. Raises ModelNotFound, Conflict (STALE_VERSION)."""
        values = {
            "min_replicas": policy.min_replicas,
            "max_replicas": policy.max_replicas,
            "scaling": policy.scaling_document,
        }
        async with self.changes.write(mutation, now, "update_policy", name, json.dumps(values)) as write:
            model = await resolve(write.connection, name)
            if not write.is_repeat:
                await write.require_version(model)
                before = await require_model(write.connection, model)
                if before.policy != policy:
                    statement = update(models).where(models.c.name == model).values(**values)
                    await write.connection.execute(statement)
                    detail = {key: str(value) for key, value in values.items()}
                    await write.record(EventKind.POLICY_CHANGED, model, **detail)
            return await require_model(write.connection, model)

    async def update_engine_settings(
        self, name: str, settings: EngineSettings, now: datetime, mutation: Mutation = PLAIN
    ) -> Model:
        """Sets how a model's engine is set, by name or alias.

        Raises:
            ModelNotFound: No such model.
            InvalidRequest: INVALID_ENGINE_SETTINGS, when a model that they lean on is not there, or is this one, or an
                adapter's name is taken.
            Conflict: STALE_VERSION.
        """
        async with self.changes.write(mutation, now, "update_engine_settings", name, settings.document) as write:
            model = await resolve(write.connection, name)
            if not write.is_repeat:
                await write.require_version(model)
                await _set_engine_settings(write, model, settings)
            return await require_model(write.connection, model)


async def _check_names(connection: AsyncConnection, name: str, new_aliases: Collection[str]) -> None:
    target = await alias_target(connection, name)
    if target is not None:
        raise _taken(name, f"{name!r} is an alias of {target!r}; delete the alias or choose another name")
    for alias in new_aliases:
        target = await alias_target(connection, alias)
        if target is not None and target != name:
            raise _taken(alias, f"{alias!r} is already an alias of {target!r}; an ingest does not move it")
        if await is_model(connection, alias):
            raise _taken(alias, f"{alias!r} is a model; an alias can't have its name")


async def _ensure_model(write: Write, name: str, digest: str) -> bool:
    """Makes a model that serves a revision, unless it is there; returns whether it was not."""
    if await is_model(write.connection, name):
        return False
    row = {"name": name, "revision": digest, "min_replicas": 0, "max_replicas": 0, "created_at_us": to_us(write.now)}
    await write.connection.execute(insert(models).values(row))
    await write.record(EventKind.MODEL_CREATED, name)
    return True


async def _put_alias(write: Write, alias: str, model: str) -> None:
    before = await alias_target(write.connection, alias)
    if before == model:
        return
    statement = upsert(write.connection, aliases).values(alias=alias, model=model)
    await write.connection.execute(statement.on_conflict_do_update(index_elements=["alias"], set_={"model": model}))
    if before is not None:
        await write.record(EventKind.ALIAS_REMOVED, before, alias=alias)
    await write.record(EventKind.ALIAS_ADDED, model, alias=alias)


async def _set_engine_settings(write: Write, model: str, settings: EngineSettings) -> None:
    await _check_engine_settings(write.connection, model, settings)
    query = select(models.c.engine_settings).where(models.c.name == model)
    if (await write.connection.execute(query)).scalar_one() == settings.document:
        return
    statement = update(models).where(models.c.name == model).values(engine_settings=settings.document)
    await write.connection.execute(statement)
    await write.record(EventKind.SETTINGS_CHANGED, model)


async def _check_engine_settings(connection: AsyncConnection, model: str, settings: EngineSettings) -> None:
    problems: dict[str, str] = {}
    for field, name in settings.required_models.items():
        if name == model:
            problems[field] = f"{name!r} is the model itself"
        elif not await is_model(connection, name):
            problems[field] = f"there is no model {name!r}; add it first"
    for field, name in settings.adapter_names.items():
        if await is_model(connection, name) or await alias_target(connection, name):
            problems[field] = f"{name!r} is a model or an alias already"
    refuse(problems)


async def _refuse_used(connection: AsyncConnection, name: str) -> None:
    """Raises PreconditionFailed (MODEL_IN_USE) if somebody said that a model is needed."""
    pinned = (await connection.execute(select(pins.c.revision).where(pins.c.model == name))).scalars().all()
    users = [f"pin of {digest[:19]}" for digest in pinned]
    # Settings that name no model don't hold its name; those that hold it are looked at by their meaning.
    holds = models.c.engine_settings.contains(json.dumps(name), autoescape=True) & (models.c.name != name)
    rows = await connection.execute(select(models.c.name, models.c.engine_settings).where(holds))
    users += [
        f"engine settings of {row.name!r}"
        for row in rows
        if name in EngineSettings(row.engine_settings).required_models.values()
    ]
    if users:
        raise PreconditionFailed(
            f"{name!r} is in use: {', '.join(users)}; take that back first, or force it",
            reason="MODEL_IN_USE",
            metadata={"model": name},
        )


async def _insert_revision(connection: AsyncConnection, digest: str, revision: NewRevision, now: datetime) -> None:
    """Writes blobs, revision and entries; what is there already stays as it is, for a revision never changes."""
    unique = {entry.digest.hash: entry.digest.size_bytes for entry in revision.manifest.entries}
    rows = [{"hash": value, "size_bytes": size} for value, size in unique.items()]
    for batch in batches(rows):
        statement = upsert(connection, blobs).values(batch)
        await connection.execute(statement.on_conflict_do_nothing(index_elements=["hash"]))
    is_known = select(literal(1)).where(revisions.c.digest == digest)
    if (await connection.execute(is_known)).scalar_one_or_none() is None:
        row = {
            "digest": digest,
            "source": revision.source,
            "size_bytes": revision.manifest.size_bytes,
            "created_at_us": to_us(now),
            "profile": json.dumps(dataclasses.asdict(revision.profile), sort_keys=True),
        }
        await connection.execute(insert(revisions).values(row))
        files: list[dict[str, object]] = [
            {"revision": digest, "path": entry.path, "blob": entry.digest.hash, "media_type": entry.media_type}
            for entry in revision.manifest.entries
        ]
        for batch in batches(files):
            await connection.execute(insert(entries).values(batch))
    if revision.converted_from is not None:
        sha256, converter = revision.converted_from
        await connection.execute(
            upsert(connection, conversions)
            .values(source_sha256=sha256, converter=converter, revision=digest)
            .on_conflict_do_update(index_elements=["source_sha256", "converter"], set_={"revision": digest})
        )


async def _add_to_history(connection: AsyncConnection, name: str, digest: str, *, is_served: bool) -> bool:
    """Puts a revision that is new or becomes the served one at the head of a model's list; says whether it is new."""
    query = (
        select(model_revisions.c.revision, model_revisions.c.ordinal)
        .where(model_revisions.c.model == name)
        .order_by(model_revisions.c.ordinal.desc())
    )
    known = (await connection.execute(query)).all()
    is_new = digest not in {row.revision for row in known}
    if is_new or (is_served and known[0].revision != digest):
        ordinal = known[0].ordinal + 1 if known else 1
        statement = upsert(connection, model_revisions).values(model=name, revision=digest, ordinal=ordinal)
        await connection.execute(
            statement.on_conflict_do_update(index_elements=["model", "revision"], set_={"ordinal": ordinal})
        )
    return is_new


def _taken(alias: str, message: str) -> AlreadyExists:
    return AlreadyExists(message, reason="ALIAS_TAKEN", metadata={"alias": alias})
