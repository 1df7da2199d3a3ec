"""``helios models durable``: whether a model's streams outlive their replicas, in the registry's policy."""

import json
from dataclasses import replace

from rich.console import Console

from helios.cli.edge import open_admin
from helios.cli.options import NOTHING_DONE
from helios.cli.state import StateDirectory
from helios.registry.client import RegistryClient


async def models_durable(
    state: StateDirectory,
    console: Console,
    name: str,
    *,
    is_durable: bool | None,
    is_dry_run: bool = False,
    is_json: bool = False,
) -> None:
    """Says for all requests of a model whether they are durable; None shows what holds, a dry run what would."""
    async with open_admin(state) as dialer:
        registry = RegistryClient(dialer)
        model = await registry.get_model(name)
        if is_durable is not None:
            policy = replace(model.policy, is_durable=is_durable)
            # The policy is replaced as a whole: what another person has set meanwhile would be gone.
            model = await registry.update_policy(
                model.name, policy, expected_version=model.version, is_dry_run=is_dry_run
            )
    if is_json:
        console.print_json(json.dumps({"model": model.name, "is_durable": model.policy.is_durable}))
        return
    if is_dry_run:
        console.print(NOTHING_DONE.rstrip())
    what = "go on on another replica where theirs dies" if model.policy.is_durable else "end with their replica"
    console.print(
        f"{model.name}: streams {what}, unless a request says otherwise (x-helios-durable)",
        markup=False,
        highlight=False,
    )
