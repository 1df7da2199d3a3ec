"""Tags, pins, rollbacks and the history of a model in SQL. Each method is one transaction. Time is passed in.

Every method takes a model by name or alias, and, where it writes, refuses a model that has changed since its caller
looked (Conflict, STALE_VERSION) and does nothing for a request that was carried out before.
"""

from datetime import datetime
from typing import Final

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.mesh.errors import InvalidRequest, PreconditionFailed
from helios.registry.blob_rows import delete_unused_revisions
from helios.registry.changes import ChangeLog
from helios.registry.database import Database
from helios.registry.events import PLAIN, EventKind, Mutation
from helios.registry.history import Cause, Move, rollback_target, stack_of
from helios.registry.model_rows import require_model, require_revision, require_tag, resolve
from helios.registry.moments import to_us
from helios.registry.names import Reference
from helios.registry.pointers import delete_tag, move_of, move_pointer, moves_of
from helios.registry.records import Model
from helios.registry.tables import model_revisions, moves, pins

# For people, on one line.
MAX_REASON_CHARS: Final = 200


class TagStore:
    """What points at the revisions of a model, as operations."""

    def __init__(self, database: Database, changes: ChangeLog) -> None:
        self._database = database
        self._changes = changes

    async def put_tag(self, target: Reference, tag: str, now: datetime, mutation: Mutation = PLAIN) -> Model:
        """Points a tag, or the served revision where ``tag`` is empty, at a revision of the same model.

        Raises:
            ModelNotFound, NotFound (TAG_NOT_FOUND), RevisionNotFound, InvalidRequest (AMBIGUOUS_REVISION): As
                ``Store.resolve``, of ``target``.
            PreconditionFailed: TOO_MANY_TAGS.
        """
        async with self._changes.write_model(target.name, now, mutation, "put_tag", tag, target.tag, target.digest) as (
            write,
            before,
        ):
            if not write.is_repeat:
                revision = await require_revision(write.connection, before, target)
                await move_pointer(write, before.name, tag, revision.digest, Cause.TAG)
            return await require_model(write.connection, before.name)

    async def delete_tag(self, name: str, tag: str, now: datetime, mutation: Mutation = PLAIN) -> Model:
        """Removes a tag. Raises ModelNotFound, NotFound (TAG_NOT_FOUND)."""
        async with self._changes.write_model(name, now, mutation, "delete_tag", tag) as (write, before):
            if not write.is_repeat:
                require_tag(before, tag)
                await delete_tag(write, before.name, tag)
            return await require_model(write.connection, before.name)

    async def roll_back(
        self, name: str, tag: str, now: datetime, mutation: Mutation = PLAIN, *, to: Reference | None = None
    ) -> Model:
        """Points a tag, or the served revision, at the revision that it had before, or at an earlier one that is named.

        Raises:
            ModelNotFound, NotFound (TAG_NOT_FOUND), RevisionNotFound: No such model, tag or revision.
            PreconditionFailed: NOTHING_TO_ROLL_BACK_TO, it had no other one, or not the named one.
        """
        wanted = to.digest if to is not None else ""
        async with self._changes.write_model(name, now, mutation, "roll_back", tag, wanted) as (write, before):
            if not write.is_repeat:
                if tag:
                    require_tag(before, tag)
                past = await moves_of(write, before.name, tag)
                if to is None:
                    digest = rollback_target(past, await _revisions_of(write.connection, before.name))
                else:
                    digest = (await require_revision(write.connection, before, to)).digest
                if digest is None or digest not in stack_of(past)[:-1]:
                    pointer = f"{before.name}@{tag}" if tag else before.name
                    raise PreconditionFailed(
                        f"{pointer!r} has not been at {'that' if to else 'another'} revision before",
                        reason="NOTHING_TO_ROLL_BACK_TO",
                        metadata={"model": before.name, "tag": tag},
                    )
                await move_pointer(write, before.name, tag, digest, Cause.ROLLBACK)
            return await require_model(write.connection, before.name)

    async def list_moves(self, name: str, *, tag: str | None, before: int | None, limit: int) -> list[Move]:
        """Returns the moves of one pointer, or of all where ``tag`` is None, the newest first. Raises ModelNotFound."""
        async with self._database.snapshot() as connection:
            model = await resolve(connection, name)
            query = select(moves).where(moves.c.model == model).order_by(moves.c.version.desc()).limit(limit)
            if tag is not None:
                query = query.where(moves.c.tag == tag)
            if before is not None:
                query = query.where(moves.c.version < before)
            return [move_of(row) for row in await connection.execute(query)]

    async def put_pin(self, target: Reference, reason: str, now: datetime, mutation: Mutation = PLAIN) -> Model:
        """Keeps a revision from being deleted; one that is pinned keeps its reason.

        Raises:
            As ``put_tag``; InvalidRequest: INVALID_REASON.
        """
        if len(reason) > MAX_REASON_CHARS or not reason.isprintable():
            raise InvalidRequest(
                f"a reason is one line of at most {MAX_REASON_CHARS} characters",
                reason="INVALID_REASON",
                metadata={"param": "reason"},
            )
        async with self._changes.write_model(
            target.name, now, mutation, "put_pin", target.tag, target.digest, reason
        ) as (
            write,
            before,
        ):
            if not write.is_repeat:
                digest = (await require_revision(write.connection, before, target)).digest
                if digest not in {pin.revision for pin in before.pins}:
                    row = {"model": before.name, "revision": digest, "reason": reason, "created_at_us": to_us(now)}
                    await write.connection.execute(insert(pins).values(row))
                    await write.record(EventKind.REVISION_PINNED, before.name, revision=digest, reason=reason)
            return await require_model(write.connection, before.name)

    async def delete_pin(self, target: Reference, now: datetime, mutation: Mutation = PLAIN) -> Model:
        """Takes a pin back; one that is not there is no error. Raises as ``put_tag``."""
        async with self._changes.write_model(target.name, now, mutation, "delete_pin", target.tag, target.digest) as (
            write,
            before,
        ):
            if not write.is_repeat:
                digest = (await require_revision(write.connection, before, target)).digest
                statement = delete(pins).where(pins.c.model == before.name, pins.c.revision == digest)
                if (await write.connection.execute(statement)).rowcount:
                    await write.record(EventKind.REVISION_UNPINNED, before.name, revision=digest)
            return await require_model(write.connection, before.name)

    async def delete_revision(
        self, target: Reference, now: datetime, mutation: Mutation = PLAIN
    ) -> tuple[Model, dict[str, int]]:
        """Removes a revision of a model, with its artifacts if no other model has it. The history keeps its digest.

        Returns:
            The model, and hash and size of the blobs that nothing refers to since.

        Raises:
            As ``put_tag``; PreconditionFailed: REVISION_IN_USE, it is served, tagged, pinned or rolled out.
        """
        async with self._changes.write_model(target.name, now, mutation, "delete_revision", target.digest) as (
            write,
            before,
        ):
            gone: dict[str, int] = {}
            if not write.is_repeat:
                digest = (await require_revision(write.connection, before, target)).digest
                _refuse_used(before, digest)
                is_it = (model_revisions.c.model == before.name) & (model_revisions.c.revision == digest)
                await write.connection.execute(delete(model_revisions).where(is_it))
                await write.record(EventKind.REVISION_DELETED, before.name, revision=digest)
                gone = await delete_unused_revisions(write.connection, [digest])
            return await require_model(write.connection, before.name), gone


async def _revisions_of(connection: AsyncConnection, model: str) -> frozenset[str]:
    query = select(model_revisions.c.revision).where(model_revisions.c.model == model)
    return frozenset((await connection.execute(query)).scalars())


def _refuse_used(model: Model, digest: str) -> None:
    users = ["it is served"] if model.revision.digest == digest else []
    users += [f"tag {tag.name!r} names it" for tag in model.tags if tag.revision.digest == digest]
    if model.rollout is not None and model.rollout.revision.digest == digest:
        users.append(f"{model.rollout.weight_percent} % of the requests are its rollout's")
    users += [f"it is pinned ({pin.reason or 'no reason given'})" for pin in model.pins if pin.revision == digest]
    if users:
        raise PreconditionFailed(
            f"{digest[:19]} of {model.name!r} is in use: {', '.join(users)}",
            reason="REVISION_IN_USE",
            metadata={"model": model.name, "revision": digest},
        )
