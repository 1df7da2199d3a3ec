"""Models, revisions, aliases and policies in SQL. Each method is one transaction; afterwards a name means one thing.

The store knows which blobs are referenced, not the files; ``catalog`` orders its writes, tells watchers, and lets the
blob store delete what ``unreferenced`` names. Time is passed in.
"""

import dataclasses
import json
from collections.abc import Collection, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import delete, func, insert, literal, select, union, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.mesh.errors import AlreadyExists, ModelNotFound, NotFound, RevisionNotFound
from helios.registry.database import Database, upsert
from helios.registry.engine_settings import EngineSettings, refuse
from helios.registry.manifest import Digest, Entry, Manifest
from helios.registry.profile import ModelProfile
from helios.registry.records import Model, ModelPolicy, Revision
from helios.registry.tables import (
    aliases,
    artifact_entries,
    blobs,
    conversions,
    entries,
    model_revisions,
    models,
    revisions,
)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# SQLite takes 32,766 variables in a statement; several columns share one statement.
_BATCH: Final = 1_000


@dataclasses.dataclass(frozen=True, slots=True)
class NewRevision:
    """What an ingest found: a manifest whose blobs are all on disk.

    Attributes:
        converted_from: sha256 of the source file and the converter's version, where the files are a conversion's.
        engine_settings: The model's from now on; None: it keeps those it has.
    """

    manifest: Manifest
    profile: ModelProfile
    source: str
    converted_from: tuple[str, str] | None = None
    engine_settings: EngineSettings | None = None


class Store:
    """The registry's tables as operations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list_models(self, *, after: str = "", limit: int | None = None) -> list[Model]:
        """Returns models by name, from the first after ``after``; all where ``limit`` is None."""
        async with self._database.snapshot() as connection:
            return await _select_models(connection, models.c.name > after, limit=limit)

    async def count_models(self) -> int:
        """Returns how many models there are."""
        async with self._database.snapshot() as connection:
            return (await connection.execute(select(func.count()).select_from(models))).scalar_one()

    async def get_model(self, name: str) -> Model:
        """Returns a model by name or alias. Raises ModelNotFound."""
        async with self._database.snapshot() as connection:
            return await _require_model(connection, await _resolve(connection, name))

    async def check_names(self, name: str, new_aliases: Collection[str]) -> None:
        """Raises AlreadyExists (ALIAS_TAKEN) if an ingest could not give a model this name and these aliases."""
        async with self._database.snapshot() as connection:
            await _check_names(connection, name, new_aliases)

    async def put_model(self, name: str, new_aliases: Collection[str], revision: NewRevision, now: datetime) -> Model:
        """Makes a revision the served one of a model, which is made if it is not there. Idempotent.

        Raises:
            AlreadyExists: ALIAS_TAKEN, when the name is an alias, or an alias names another model or is a model.
            InvalidRequest: INVALID_ENGINE_SETTINGS, as ``update_engine_settings``.
        """
        digest = revision.manifest.digest()
        async with self._database.transaction() as connection:
            await _check_names(connection, name, new_aliases)
            await _insert_revision(connection, digest, revision, now)
            changes = {"revision": digest}
            if revision.engine_settings is not None:
                await _check_engine_settings(connection, name, revision.engine_settings)
                changes["engine_settings"] = revision.engine_settings.document
            row = {"name": name, "min_replicas": 0, "max_replicas": 0, "created_at_us": to_us(now)} | changes
            await connection.execute(
                upsert(connection, models).values(row).on_conflict_do_update(index_elements=["name"], set_=changes)
            )
            await _serve_revision(connection, name, digest)
            for alias in new_aliases:
                statement = upsert(connection, aliases).values(alias=alias, model=name)
                await connection.execute(statement.on_conflict_do_nothing(index_elements=["alias"]))
            return await _require_model(connection, name)

    async def delete_model(self, name: str) -> None:
        """Removes a model, its aliases, and the revisions that no other model has. Raises ModelNotFound."""
        async with self._database.transaction() as connection:
            found = (await connection.execute(delete(models).where(models.c.name == name))).rowcount
            if not found:
                raise _no_model(name)
            used = select(model_revisions.c.revision)
            await connection.execute(delete(revisions).where(revisions.c.digest.not_in(used)))
            await delete_unused_blobs(connection)

    async def list_revisions(self, name: str, *, before: int | None, limit: int) -> list[tuple[int, Revision]]:
        """Returns a model's revisions, newest first, with the ordinal to continue from. Raises ModelNotFound."""
        async with self._database.snapshot() as connection:
            model = await _resolve(connection, name)
            query = (
                select(model_revisions.c.ordinal, *revisions.c)
                .join(revisions, revisions.c.digest == model_revisions.c.revision)
                .where(model_revisions.c.model == model)
                .order_by(model_revisions.c.ordinal.desc())
                .limit(limit)
            )
            if before is not None:
                query = query.where(model_revisions.c.ordinal < before)
            return [(row.ordinal, _revision(row)) for row in await connection.execute(query)]

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
            return Manifest.of(found), _revision(row)

    async def find_conversion(self, source_sha256: str, converter: str) -> str | None:
        """Returns the revision that a file became with this converter, None if it was not converted yet."""
        query = select(conversions.c.revision).where(
            conversions.c.source_sha256 == source_sha256, conversions.c.converter == converter
        )
        async with self._database.snapshot() as connection:
            found: str | None = (await connection.execute(query)).scalar_one_or_none()
            return found

    async def put_alias(self, alias: str, model: str) -> tuple[Model, str | None]:
        """Makes an alias point at a model; returns that model and the name of the model it pointed at before.

        Raises:
            ModelNotFound: No model has the name ``model``.
            AlreadyExists: MODEL_EXISTS, a model has the name ``alias``.
        """
        async with self._database.transaction() as connection:
            await _require_model(connection, model)
            if await _select_models(connection, models.c.name == alias):
                raise AlreadyExists(
                    f"{alias!r} is a model; an alias can't have its name",
                    reason="MODEL_EXISTS",
                    metadata={"alias": alias},
                )
            before = await _alias_target(connection, alias)
            await connection.execute(
                upsert(connection, aliases)
                .values(alias=alias, model=model)
                .on_conflict_do_update(index_elements=["alias"], set_={"model": model})
            )
            return await _require_model(connection, model), before

    async def delete_alias(self, alias: str) -> Model:
        """Removes an alias; returns the model that it named. Raises NotFound (ALIAS_NOT_FOUND)."""
        async with self._database.transaction() as connection:
            model = await _alias_target(connection, alias)
            if model is None:
                raise NotFound(f"there is no alias {alias!r}", reason="ALIAS_NOT_FOUND", metadata={"alias": alias})
            await connection.execute(delete(aliases).where(aliases.c.alias == alias))
            return await _require_model(connection, model)

    async def update_policy(self, name: str, policy: ModelPolicy) -> Model:
        """Sets a model's policy, by name or alias. Raises ModelNotFound."""
        async with self._database.transaction() as connection:
            model = await _resolve(connection, name)
            values = dataclasses.asdict(policy)
            await connection.execute(update(models).where(models.c.name == model).values(**values))
            return await _require_model(connection, model)

    async def update_engine_settings(self, name: str, settings: EngineSettings) -> Model:
        """Sets how a model's engine is set, by name or alias.

        Raises:
            ModelNotFound: No such model.
            InvalidRequest: INVALID_ENGINE_SETTINGS, when a model that they lean on is not there, or is this one, or an
                adapter's name is taken.
        """
        async with self._database.transaction() as connection:
            model = await _resolve(connection, name)
            await _check_engine_settings(connection, model, settings)
            statement = update(models).where(models.c.name == model).values(engine_settings=settings.document)
            await connection.execute(statement)
            return await _require_model(connection, model)

    async def referenced_blobs(self) -> dict[str, int]:
        """Returns hash and size of every blob that a revision or an artifact uses."""
        async with self._database.snapshot() as connection:
            rows = await connection.execute(select(blobs.c.hash, blobs.c.size_bytes))
            return {row.hash: row.size_bytes for row in rows}


async def delete_unused_blobs(connection: AsyncConnection) -> None:
    """Removes the rows of blobs that neither a revision nor an artifact uses."""
    is_used = blobs.c.hash.in_(select(entries.c.blob)) | blobs.c.hash.in_(select(artifact_entries.c.blob))
    await connection.execute(delete(blobs).where(~is_used))


async def _select_models(connection: AsyncConnection, condition: Any, limit: int | None = None) -> list[Model]:
    query = (
        select(models.c.name, models.c.min_replicas, models.c.max_replicas, models.c.created_at_us.label("made_us"))
        .add_columns(models.c.engine_settings, *revisions.c)
        .join(revisions, revisions.c.digest == models.c.revision)
        .where(condition)
        .order_by(models.c.name)
        .limit(limit)
    )
    rows = (await connection.execute(query)).all()
    if not rows:
        return []
    names = [row.name for row in rows]
    by_model: dict[str, list[str]] = {name: [] for name in names}
    # A range, not a list of names: it needs two variables however many models there are.
    spoken = select(aliases).where(aliases.c.model.between(names[0], names[-1])).order_by(aliases.c.alias)
    for row in await connection.execute(spoken):
        if row.model in by_model:
            by_model[row.model].append(row.alias)
    return [
        Model(
            name=row.name,
            aliases=tuple(by_model[row.name]),
            revision=_revision(row),
            policy=ModelPolicy(row.min_replicas, row.max_replicas),
            created_at=from_us(row.made_us),
            engine_settings=EngineSettings(row.engine_settings),
        )
        for row in rows
    ]


async def _require_model(connection: AsyncConnection, name: str) -> Model:
    found = await _select_models(connection, models.c.name == name)
    if not found:
        raise _no_model(name)
    return found[0]


async def _resolve(connection: AsyncConnection, name: str) -> str:
    query = union(
        select(models.c.name).where(models.c.name == name), select(aliases.c.model).where(aliases.c.alias == name)
    )
    found: str | None = (await connection.execute(query)).scalar_one_or_none()
    if found is None:
        raise _no_model(name)
    return found


async def _alias_target(connection: AsyncConnection, alias: str) -> str | None:
    query = select(aliases.c.model).where(aliases.c.alias == alias)
    found: str | None = (await connection.execute(query)).scalar_one_or_none()
    return found


async def _check_names(connection: AsyncConnection, name: str, new_aliases: Collection[str]) -> None:
    target = await _alias_target(connection, name)
    if target is not None:
        raise _taken(name, f"{name!r} is an alias of {target!r}; delete the alias or choose another name")
    for alias in new_aliases:
        target = await _alias_target(connection, alias)
        if target is not None and target != name:
            raise _taken(alias, f"{alias!r} is already an alias of {target!r}; an ingest does not move it")
        if await _select_models(connection, models.c.name == alias):
            raise _taken(alias, f"{alias!r} is a model; an alias can't have its name")


async def _check_engine_settings(connection: AsyncConnection, model: str, settings: EngineSettings) -> None:
    problems: dict[str, str] = {}
    for field, name in settings.required_models.items():
        if name == model:
            problems[field] = f"{name!r} is the model itself"
        elif not await _select_models(connection, models.c.name == name):
            problems[field] = f"there is no model {name!r}; add it first"
    for field, name in settings.adapter_names.items():
        if await _select_models(connection, models.c.name == name) or await _alias_target(connection, name):
            problems[field] = f"{name!r} is a model or an alias already"
    refuse(problems)


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
        files = [
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


async def _serve_revision(connection: AsyncConnection, name: str, digest: str) -> None:
    """Puts a revision at the head of a model's history; one that is there already stays if it is the newest."""
    query = (
        select(model_revisions.c.revision, model_revisions.c.ordinal)
        .where(model_revisions.c.model == name)
        .order_by(model_revisions.c.ordinal.desc())
        .limit(1)
    )
    newest = (await connection.execute(query)).one_or_none()
    if newest is not None and newest.revision == digest:
        return
    ordinal = 1 if newest is None else newest.ordinal + 1
    await connection.execute(
        upsert(connection, model_revisions)
        .values(model=name, revision=digest, ordinal=ordinal)
        .on_conflict_do_update(index_elements=["model", "revision"], set_={"ordinal": ordinal})
    )


def _revision(row: Any) -> Revision:
    return Revision(
        digest=row.digest,
        profile=ModelProfile(**json.loads(row.profile)),
        source=row.source,
        size_bytes=row.size_bytes,
        created_at=from_us(row.created_at_us),
    )


def batches(rows: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    """Returns rows in portions that one statement takes."""
    return (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH))


def to_us(moment: datetime) -> int:
    """Returns a moment in microseconds since 1970."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def from_us(value: int) -> datetime:
    """Returns the moment of ``to_us``."""
    return _EPOCH + timedelta(microseconds=value)


def _no_model(name: str) -> ModelNotFound:
    return ModelNotFound(f"there is no model {name!r}", metadata={"model": name})


def _taken(alias: str, message: str) -> AlreadyExists:
    return AlreadyExists(message, reason="ALIAS_TAKEN", metadata={"alias": alias})
