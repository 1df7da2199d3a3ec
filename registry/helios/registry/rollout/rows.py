"""Rows of rollouts and their steps. Works in the transaction that it is given."""

from typing import Any, Final

from sqlalchemy import delete, insert, select, update

from helios.registry.changes import Write
from helios.registry.events import EventKind
from helios.registry.moments import from_us, to_us
from helios.registry.rollout.steps import Act, RolloutStep
from helios.registry.tables import rollout_steps, rollouts

# Steps that are remembered of a model's rollouts, as many as moves of a pointer.
MAX_STEPS: Final = 1_000


async def put_weight(write: Write, model: str, digest: str, percent: int) -> None:
    """Gives a model's canary a share; what is so already is left alone, and another canary's rollout ends."""
    found = await _rollout_of(write, model)
    if found is not None and found.revision != digest:
        await end(write, model, Act.REPLACE)
        found = None
    if found is not None and found.weight_percent == percent:
        return
    if found is None:
        row = {"model": model, "revision": digest, "weight_percent": percent, "started_at_us": to_us(write.now)}
        await write.connection.execute(insert(rollouts).values(row))
    else:
        statement = update(rollouts).where(rollouts.c.model == model).values(weight_percent=percent)
        await write.connection.execute(statement)
    version = await write.record(EventKind.ROLLOUT_MOVED, model, revision=digest, weight_percent=str(percent))
    await _remember(write, model, RolloutStep(version, digest, percent, Act.WEIGHT, write.actor, write.now))


async def end(write: Write, model: str, act: Act, *, canary: str | None = None) -> None:
    """Ends a model's rollout, if there is one; only that of ``canary`` where one is named."""
    found = await _rollout_of(write, model)
    if found is None or canary not in (None, found.revision):
        return
    await write.connection.execute(delete(rollouts).where(rollouts.c.model == model))
    version = await write.record(EventKind.ROLLOUT_ENDED, model, revision=found.revision, act=act.value)
    await _remember(write, model, RolloutStep(version, found.revision, 0, act, write.actor, write.now))


def step_of(row: Any) -> RolloutStep:
    """Returns the step of a row of ``rollout_steps``."""
    return RolloutStep(row.version, row.revision, row.weight_percent, Act(row.act), row.actor, from_us(row.at_us))


async def _rollout_of(write: Write, model: str) -> Any:
    return (await write.connection.execute(select(rollouts).where(rollouts.c.model == model))).one_or_none()


async def _remember(write: Write, model: str, step: RolloutStep) -> None:
    row = {
        "version": step.version,
        "model": model,
        "revision": step.revision,
        "weight_percent": step.weight_percent,
        "act": step.act.value,
        "actor": step.actor,
        "at_us": to_us(step.at),
    }
    await write.connection.execute(insert(rollout_steps).values(row))
    of_model = rollout_steps.c.model == model
    newest_first = rollout_steps.c.version.desc()
    oldest = select(rollout_steps.c.version).where(of_model).order_by(newest_first).offset(MAX_STEPS).limit(1)
    await write.connection.execute(
        delete(rollout_steps).where(of_model & (rollout_steps.c.version <= oldest.scalar_subquery()))
    )
