"""Rollouts in SQL, as operations. Each method is one transaction, as ``tag_store``'s are. Time is passed in."""

from datetime import datetime

from sqlalchemy import select

from helios.mesh.errors import PreconditionFailed
from helios.registry.changes import ChangeLog
from helios.registry.database import Database
from helios.registry.events import PLAIN, Mutation
from helios.registry.history import Cause
from helios.registry.model_rows import require_model, require_revision, resolve
from helios.registry.names import Reference
from helios.registry.pointers import move_pointer
from helios.registry.records import Model, Rollout
from helios.registry.rollout import rows
from helios.registry.rollout.steps import Act, RolloutStep, check_weight
from helios.registry.store import Guard
from helios.registry.tables import rollout_steps


class RolloutStore:
    """The rollouts of models."""

    def __init__(self, database: Database, changes: ChangeLog) -> None:
        self._database = database
        self._changes = changes

    async def put(
        self,
        target: Reference,
        percent: int,
        now: datetime,
        mutation: Mutation = PLAIN,
        *,
        guard: Guard | None = None,
    ) -> Model:
        """Sends a share of a model's requests to a revision of it, if ``guard`` holds.

        Raises:
            ModelNotFound, NotFound, RevisionNotFound, InvalidRequest: As ``Store.resolve``; INVALID_WEIGHT.
            PreconditionFailed: ROLLOUT_OF_SERVED, ROLLOUT_OF_ADAPTER.
            Conflict: STALE_VERSION.
            HeliosError: As the guard.
        """
        check_weight(percent)
        asked = ("put_rollout", target.tag, target.digest, str(percent))
        async with self._changes.write_model(target.name, now, mutation, *asked) as (write, before):
            if not write.is_repeat:
                if guard is not None:
                    await guard.require(write.connection)
                revision = await require_revision(write.connection, before, target)
                metadata = {"model": before.name, "revision": revision.digest}
                if revision.profile.base_model:
                    raise PreconditionFailed(
                        f"{before.name!r} is a LoRA adapter, which the replicas of other models have in one revision",
                        reason="ROLLOUT_OF_ADAPTER",
                        metadata=metadata,
                    )
                if revision.digest == before.revision.digest:
                    raise PreconditionFailed(
                        f"{before.name!r} serves {revision.digest[:19]} already; name another revision",
                        reason="ROLLOUT_OF_SERVED",
                        metadata=metadata,
                    )
                await rows.put_weight(write, before.name, revision.digest, percent)
            return await require_model(write.connection, before.name)

    async def promote(self, name: str, now: datetime, mutation: Mutation = PLAIN) -> Model:
        """Serves the canary. Raises ModelNotFound, PreconditionFailed (NO_ROLLOUT), Conflict (STALE_VERSION)."""
        async with self._changes.write_model(name, now, mutation, "promote_rollout") as (write, before):
            if not write.is_repeat:
                canary = _require_rollout(before).revision.digest
                # Which ends the rollout, as any other move to it does.
                await move_pointer(write, before.name, "", canary, Cause.PROMOTION)
            return await require_model(write.connection, before.name)

    async def abort(self, name: str, now: datetime, mutation: Mutation = PLAIN) -> Model:
        """Gives the canary up. Raises as ``promote``."""
        async with self._changes.write_model(name, now, mutation, "abort_rollout") as (write, before):
            if not write.is_repeat:
                _require_rollout(before)
                await rows.end(write, before.name, Act.ABORT)
            return await require_model(write.connection, before.name)

    async def list_steps(self, name: str, *, before: int | None, limit: int) -> list[RolloutStep]:
        """Returns what was done to a model's rollouts, the newest step first. Raises ModelNotFound."""
        async with self._database.snapshot() as connection:
            model = await resolve(connection, name)
            query = select(rollout_steps).where(rollout_steps.c.model == model)
            if before is not None:
                query = query.where(rollout_steps.c.version < before)
            found = await connection.execute(query.order_by(rollout_steps.c.version.desc()).limit(limit))
            return list(map(rows.step_of, found))


def _require_rollout(model: Model) -> Rollout:
    if model.rollout is None:
        raise PreconditionFailed(
            f"{model.name!r} has no rollout; all of its requests go to what it serves",
            reason="NO_ROLLOUT",
            metadata={"model": model.name},
        )
    return model.rollout
