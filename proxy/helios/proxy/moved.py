"""Requests that wait for an entry that is gone: they wait on for what their name means now. Pure.

A canary's entry goes when it is promoted or aborted, one that tags named when the last tag has moved. Whoever asked by
a name that means another entry since then asked for that one: a new request of that name would go there, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from helios.mesh.errors import HeliosError, NoReadyReplica
from helios.proxy import actions
from helios.proxy.admission.keyring import check_model
from helios.proxy.catalogue import Catalogue, ModelEntry, is_by_digest, shown
from helios.proxy.holds import Hold, Holds, too_many
from helios.proxy.refusals import model_not_found

# The registry is asked when the client comes again.
_ASK_AGAIN_SECONDS = 1.0


def move_holds(
    model: str,
    now: float,
    *,
    holds: Holds,
    catalogue: Catalogue,
    remaining_seconds: Callable[[ModelEntry, float], float],
) -> tuple[list[actions.Action], set[str]]:
    """Gives the holds of an entry that is gone to the entries that their names mean now.

    Returns what is to be told of those that moved, or can't, and the names of the entries that have more holds now.
    """
    todo: list[actions.Action] = []
    homes: set[str] = set()
    for hold in holds.take_all(model):
        try:
            home = _home(catalogue, hold)
            check_model(hold.caller, home, hold.name)
            moved = replace(hold, model=home.name, adapter=hold.name if hold.name in home.adapters else "")
            shed = _admit(holds, moved, remaining_seconds(home, now))
        except HeliosError as error:
            todo.append(actions.Fail(hold, error))
            continue
        todo.append(actions.HoldMoved(moved, model, home.revision))
        homes.add(home.name)
        if shed is not None:
            refusal = too_many(home.name, "shed")
            refusal.retry_after_seconds = remaining_seconds(home, now)
            todo.append(actions.Fail(shed, refusal))
    return todo, homes


def _home(catalogue: Catalogue, hold: Hold) -> ModelEntry:
    """What a hold's name means now. Raises ModelNotFound: nothing; NoReadyReplica: only the registry can say."""
    name, _, which = hold.name.partition("@")
    home, served = catalogue.find(hold.name), catalogue.find(name)
    if home is None and served is not None and is_by_digest(hold.name):
        if not served.revision.removeprefix("sha256:").startswith(which.removeprefix("sha256:")):
            raise NoReadyReplica(
                f"the revision '{shown(hold.name)}' was taken away while the request waited; try again",
                metadata={"model": shown(hold.name)},
                retry_after_seconds=_ASK_AGAIN_SECONDS,
            )
        home = served
    if home is None or home.name == hold.model:
        raise model_not_found(hold.name)
    return home


def _admit(holds: Holds, hold: Hold, retry_after_seconds: float) -> Hold | None:
    try:
        return holds.admit(hold)
    except HeliosError as error:
        error.retry_after_seconds = retry_after_seconds
        raise
