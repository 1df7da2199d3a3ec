"""``helios models rollout``: a share of a model's requests for another revision, then all of them, or none."""

import json
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

from rich.console import Console
from rich.table import Table

from helios.cli.edge import open_admin
from helios.cli.model_versions import short
from helios.cli.options import NOTHING_DONE
from helios.cli.state import StateDirectory
from helios.mesh.errors import InvalidRequest
from helios.registry.client import Model, RegistryClient, RolloutClient

_SHOWN_STEPS: Final = 20


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be done; nothing: only shown. ``to`` is a tag, or digits of a revision's digest."""

    to: str = ""
    weight: int | None = None
    is_promoted: bool = False
    is_aborted: bool = False

    def check(self) -> "Change":
        """Returns itself. Raises InvalidRequest where it is more than one thing, or half of one."""
        acts = (bool(self.to) or self.weight is not None, self.is_promoted, self.is_aborted)
        if sum(acts) > 1:
            raise InvalidRequest("give --to and --weight, or --promote, or --abort", reason="INVALID_ARGUMENT")
        if self.to and self.weight is None:
            raise InvalidRequest("--to needs --weight: the share of the requests in percent", reason="INVALID_ARGUMENT")
        return self


async def rollout(
    state: StateDirectory, console: Console, name: str, change: Change, *, is_json: bool, is_dry_run: bool = False
) -> None:
    """Changes a model's rollout, or shows it with what was done to it."""
    change.check()
    async with open_admin(state) as dialer:
        rollouts = RolloutClient(dialer)
        request_id = uuid4().hex
        if change.weight is not None:
            to = change.to or await _canary(RegistryClient(dialer), name)
            model = await rollouts.put(f"{name}@{to}", change.weight, request_id=request_id, is_dry_run=is_dry_run)
        elif change.is_promoted:
            model = await rollouts.promote(name, request_id=request_id, is_dry_run=is_dry_run)
        elif change.is_aborted:
            model = await rollouts.abort(name, request_id=request_id, is_dry_run=is_dry_run)
        else:
            model = await RegistryClient(dialer).get_model(name)
        steps = await rollouts.list_steps(model.name, limit=_SHOWN_STEPS)
    if is_json:
        told = [
            {
                "version": step.version,
                "revision": step.revision,
                "weight_percent": step.weight_percent,
                "act": step.act.value,
                "actor": step.actor,
                "at": step.at.isoformat(timespec="seconds"),
            }
            for step in steps
        ]
        console.print_json(json.dumps(rollout_of(model) | {"steps": told}))
        return
    console.print(NOTHING_DONE * is_dry_run + _told(model), markup=False, highlight=False, soft_wrap=True)
    if change == Change() and steps:
        table = Table("when", "revision", "weight", "what", box=None)
        for step in steps:
            when = f"{step.at.astimezone():%Y-%m-%d %H:%M:%S}"
            table.add_row(when, short(step.revision), f"{step.weight_percent} %", step.act.value)
        console.print(table)


def rollout_of(model: Model) -> dict[str, Any]:
    """Returns which revisions answer a model's requests, for JSON."""
    found = model.rollout
    return {
        "model": model.name,
        "served": model.revision.digest,
        "canary": found.revision.digest if found is not None else "",
        "weight_percent": found.weight_percent if found is not None else 0,
        "version": model.version,
    }


async def _canary(registry: RegistryClient, name: str) -> str:
    model = await registry.get_model(name)
    if model.rollout is None:
        raise InvalidRequest(f"{name} has no rollout yet: name a revision with --to", reason="INVALID_ARGUMENT")
    return model.rollout.revision.digest


def _told(model: Model) -> str:
    served = short(model.revision.digest)
    if model.rollout is None:
        return f"all requests for {model.name} go to {served}"
    weight = model.rollout.weight_percent
    return f"{100 - weight} % of the requests for {model.name} go to {served}, {weight} % to " + short(
        model.rollout.revision.digest
    )
