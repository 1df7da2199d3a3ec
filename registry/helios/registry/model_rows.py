"""Reading models: rows to values, and names to rows. Every function works in the transaction that it is given."""

import json
from collections import defaultdict
from typing import Any

from sqlalchemy import ColumnElement, select, union
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.mesh.errors import InvalidRequest, ModelNotFound, NotFound, RevisionNotFound
from helios.registry.engine_settings import EngineSettings
from helios.registry.moments import from_us
from helios.registry.names import Reference
from helios.registry.policy import policy_of
from helios.registry.profile import ModelProfile
from helios.registry.records import Model, Pin, Revision, Rollout, Tag
from helios.registry.tables import aliases, model_revisions, models, pins, revisions, rollouts, tags


async def select_models(connection: AsyncConnection, condition: Any, limit: int | None = None) -> list[Model]:
    """Returns the models that a condition on ``models`` holds for, by name, with all that belongs to them."""
    query = (
        select(models.c.name, models.c.min_replicas, models.c.max_replicas, models.c.created_at_us.label("made_us"))
        .add_columns(models.c.scaling, models.c.engine_settings, models.c.version, *revisions.c)
        .join(revisions, revisions.c.digest == models.c.revision)
        .where(condition)
        .order_by(models.c.name)
        .limit(limit)
    )
    rows = (await connection.execute(query)).all()
    if not rows:
        return []
    # Ranges, not lists of names: they need two variables however many models there are.
    first, last = rows[0].name, rows[-1].name
    spoken: dict[str, list[str]] = defaultdict(list)
    names = select(aliases).where(_lies(aliases.c.model, first, last)).order_by(aliases.c.alias)
    for row in await connection.execute(names):
        spoken[row.model].append(row.alias)
    tagged = await _tags(connection, first, last)
    pinned: dict[str, list[Pin]] = defaultdict(list)
    kept = select(pins).where(_lies(pins.c.model, first, last)).order_by(pins.c.revision)
    for row in await connection.execute(kept):
        pinned[row.model].append(Pin(row.revision, row.reason, from_us(row.created_at_us)))
    rolled_out = await _rollouts(connection, first, last)
    return [
        Model(
            name=row.name,
            aliases=tuple(spoken[row.name]),
            revision=revision_of(row),
            policy=policy_of(row.min_replicas, row.max_replicas, row.scaling),
            created_at=from_us(row.made_us),
            engine_settings=EngineSettings(row.engine_settings),
            tags=tuple(tagged[row.name]),
            pins=tuple(pinned[row.name]),
            rollout=rolled_out.get(row.name),
            version=row.version,
        )
        for row in rows
    ]


async def require_model(connection: AsyncConnection, name: str) -> Model:
    """Returns a model by its name. Raises ModelNotFound."""
    found = await select_models(connection, models.c.name == name)
    if not found:
        raise no_model(name)
    return found[0]


async def find_model(connection: AsyncConnection, name: str) -> Model:
    """Returns a model by its name or an alias, in as few statements as one by its name. Raises ModelNotFound."""
    meant = union(
        select(models.c.name).where(models.c.name == name), select(aliases.c.model).where(aliases.c.alias == name)
    )
    found = await select_models(connection, models.c.name.in_(meant))
    if not found:
        raise no_model(name)
    return found[0]


async def resolve(connection: AsyncConnection, name: str) -> str:
    """Returns the name of the model with a name or alias. Raises ModelNotFound."""
    query = union(
        select(models.c.name).where(models.c.name == name), select(aliases.c.model).where(aliases.c.alias == name)
    )
    found: str | None = (await connection.execute(query)).scalar_one_or_none()
    if found is None:
        raise no_model(name)
    return found


async def alias_target(connection: AsyncConnection, alias: str) -> str | None:
    """Returns the model that an alias names, None where there is no such alias."""
    query = select(aliases.c.model).where(aliases.c.alias == alias)
    found: str | None = (await connection.execute(query)).scalar_one_or_none()
    return found


async def is_model(connection: AsyncConnection, name: str) -> bool:
    """Returns whether a model has this name."""
    query = select(models.c.name).where(models.c.name == name)
    return (await connection.execute(query)).scalar_one_or_none() is not None


async def require_revision(connection: AsyncConnection, model: Model, reference: Reference) -> Revision:
    """Returns the revision of a model that a reference means.

    Raises:
        NotFound: TAG_NOT_FOUND.
        RevisionNotFound: The model has no revision that begins so.
        InvalidRequest: AMBIGUOUS_REVISION, it has several.
    """
    if not reference.digest:
        return require_tag(model, reference.tag) if reference.tag else model.revision
    # "g" sorts after every hexadecimal digit.
    is_meant = _lies(revisions.c.digest, reference.digest, reference.digest + "g")
    known = select(model_revisions.c.revision).where(model_revisions.c.model == model.name)
    query = select(revisions).where(is_meant & revisions.c.digest.in_(known)).limit(2)
    found = (await connection.execute(query)).all()
    if len(found) > 1:
        raise InvalidRequest(
            f"several revisions of {model.name!r} begin with {reference.digest}; give more digits",
            reason="AMBIGUOUS_REVISION",
            metadata={"param": "revision"},
        )
    if not found:
        raise RevisionNotFound(
            f"{model.name!r} has no revision {reference.digest}",
            metadata={"model": model.name, "revision": reference.digest},
        )
    return revision_of(found[0])


def require_tag(model: Model, tag: str) -> Revision:
    """Returns the revision that a model's tag names. Raises NotFound (TAG_NOT_FOUND)."""
    for one in model.tags:
        if one.name == tag:
            return one.revision
    raise NotFound(
        f"{model.name!r} has no tag {tag!r}", reason="TAG_NOT_FOUND", metadata={"model": model.name, "tag": tag}
    )


def revision_of(row: Any) -> Revision:
    """Returns the revision of a row of ``revisions``."""
    return Revision(
        digest=row.digest,
        profile=ModelProfile(**json.loads(row.profile)),
        source=row.source,
        size_bytes=row.size_bytes,
        created_at=from_us(row.created_at_us),
    )


def no_model(name: str) -> ModelNotFound:
    """Returns the error of a name that is no model's."""
    return ModelNotFound(f"there is no model {name!r}", metadata={"model": name})


def _lies(column: ColumnElement[str], first: str, last: str) -> ColumnElement[bool]:
    """Returns whether a text lies in a range. PostgreSQL's grammar takes no BETWEEN of what says how it is sorted."""
    return (column >= first) & (column <= last)


async def _tags(connection: AsyncConnection, first: str, last: str) -> dict[str, list[Tag]]:
    query = (
        select(tags.c.model, tags.c.tag, tags.c.moved_at_us, *revisions.c)
        .join(revisions, revisions.c.digest == tags.c.revision)
        .where(_lies(tags.c.model, first, last))
        .order_by(tags.c.tag)
    )
    found: dict[str, list[Tag]] = defaultdict(list)
    for row in await connection.execute(query):
        found[row.model].append(Tag(row.tag, revision_of(row), from_us(row.moved_at_us)))
    return found


async def _rollouts(connection: AsyncConnection, first: str, last: str) -> dict[str, Rollout]:
    query = (
        select(rollouts.c.model, rollouts.c.weight_percent, rollouts.c.started_at_us, *revisions.c)
        .join(revisions, revisions.c.digest == rollouts.c.revision)
        .where(_lies(rollouts.c.model, first, last))
    )
    return {
        row.model: Rollout(revision_of(row), row.weight_percent, from_us(row.started_at_us))
        for row in await connection.execute(query)
    }
