"""Moving a pointer: a model's served revision, or a tag. Works in the transaction that it is given."""

from sqlalchemy import delete, func, insert, select, update

from helios.mesh.errors import PreconditionFailed
from helios.registry.changes import Write, read_version
from helios.registry.database import upsert
from helios.registry.events import EventKind
from helios.registry.history import Cause, Move
from helios.registry.moments import from_us, to_us
from helios.registry.names import MAX_TAGS
from helios.registry.rollout import rows as rollouts
from helios.registry.rollout.steps import Act
from helios.registry.tables import models, moves, tags

# Moves that are remembered of a pointer; a rollback goes no further back.
MAX_MOVES = 1_000


async def move_pointer(write: Write, model: str, tag: str, digest: str, cause: Cause) -> None:
    """Points a tag, or the served revision where ``tag`` is empty, at one of the model's revisions, and remembers it.

    One that points there already is left alone, but for its first move.

    Raises:
        PreconditionFailed: TOO_MANY_TAGS.
    """
    connection = write.connection
    newest = await _newest_move(write, model, tag)
    if newest == digest:
        return
    if tag:
        if newest is None:
            await _require_room(write, model)
        values = {"revision": digest, "moved_at_us": to_us(write.now)}
        statement = upsert(connection, tags).values(model=model, tag=tag, **values)
        await connection.execute(statement.on_conflict_do_update(index_elements=["model", "tag"], set_=values))
        kind = EventKind.TAG_MOVED
    else:
        await connection.execute(update(models).where(models.c.name == model).values(revision=digest))
        kind = EventKind.SERVED_MOVED
    await write.record(kind, model, tag=tag, revision=digest, cause=cause.value)
    await _remember(write, model, tag, digest, cause)
    if not tag:
        # What is served has no share beside itself.
        await rollouts.end(write, model, Act.PROMOTE, canary=digest)


async def delete_tag(write: Write, model: str, tag: str) -> None:
    """Removes a tag that is there; its history stays, and a later tag of that name begins anew."""
    await write.connection.execute(delete(tags).where(tags.c.model == model, tags.c.tag == tag))
    await write.record(EventKind.TAG_DELETED, model, tag=tag)
    await _remember(write, model, tag, None, Cause.DELETE)


async def moves_of(write: Write, model: str, tag: str) -> list[Move]:
    """Returns the moves of a pointer, the oldest first."""
    query = (
        select(moves)
        .where(moves.c.model == model, moves.c.tag == tag)
        .order_by(moves.c.version.desc())
        .limit(MAX_MOVES)
    )
    return [move_of(row) for row in (await write.connection.execute(query)).all()][::-1]


def move_of(row: object) -> Move:
    """Returns the move of a row of ``moves``."""
    return Move(row.version, row.tag, row.revision, Cause(row.cause), row.actor, from_us(row.at_us))  # type: ignore[attr-defined]


async def _newest_move(write: Write, model: str, tag: str) -> str | None:
    query = (
        select(moves.c.revision)
        .where(moves.c.model == model, moves.c.tag == tag)
        .order_by(moves.c.version.desc())
        .limit(1)
    )
    found: str | None = (await write.connection.execute(query)).scalar_one_or_none()
    return found


async def _require_room(write: Write, model: str) -> None:
    query = select(func.count()).select_from(tags).where(tags.c.model == model)
    if (await write.connection.execute(query)).scalar_one() >= MAX_TAGS:
        raise PreconditionFailed(
            f"{model!r} has {MAX_TAGS} tags, which is the limit; delete one",
            reason="TOO_MANY_TAGS",
            metadata={"model": model},
        )


async def _remember(write: Write, model: str, tag: str, digest: str | None, cause: Cause) -> None:
    row = {
        "version": await read_version(write.connection),
        "model": model,
        "tag": tag,
        "revision": digest,
        "cause": cause.value,
        "actor": write.actor,
        "at_us": to_us(write.now),
    }
    await write.connection.execute(insert(moves).values(row))
    of_pointer = (moves.c.model == model) & (moves.c.tag == tag)
    oldest = select(moves.c.version).where(of_pointer).order_by(moves.c.version.desc()).offset(MAX_MOVES).limit(1)
    await write.connection.execute(delete(moves).where(of_pointer & (moves.c.version <= oldest.scalar_subquery())))
