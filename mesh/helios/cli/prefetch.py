"""``helios cache prefetch``: have nodes fetch a model before it is asked for, and see what they fetch ahead."""

import json
from dataclasses import asdict
from typing import Final

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from helios.cli.edge import open_admin
from helios.cli.state import StateDirectory
from helios.registry.client import NodePrefetches, PrefetchClient

_SHOWN_DIGEST: Final = len("sha256:") + 12


async def prefetch(
    state: StateDirectory, console: Console, model: str, *, node: str, is_dry: bool, is_json: bool
) -> None:
    """Asks nodes for a model; without one, shows what nodes fetch ahead."""
    async with open_admin(state) as dialer:
        client = PrefetchClient(dialer)
        if not model:
            _show(console, await client.list(), is_json=is_json)
            return
        asked = await client.prefetch(model, node=node, is_dry=is_dry)
    if is_json:
        console.print_json(json.dumps({**asdict(asked), "dry_run": is_dry}))
        return
    told = f"{model} ({asked.revision[:_SHOWN_DIGEST]}, {decimal(asked.size_bytes)}): "
    verb = "would be asked" if is_dry else "asked"
    parts = [
        *([f"{verb}: {', '.join(asked.asked_nodes)}"] if asked.asked_nodes else []),
        *([f"here already: {', '.join(asked.holding_nodes)}"] if asked.holding_nodes else []),
    ]
    console.print(told + ("; ".join(parts) or "no storage agent is connected"), markup=False, soft_wrap=True)


def _show(console: Console, nodes: tuple[NodePrefetches, ...], *, is_json: bool) -> None:
    if is_json:
        console.print_json(json.dumps([asdict(node) for node in nodes]))
        return
    for node in nodes:
        console.print(
            f"{node.node}: {decimal(node.fetched_bytes)} fetched ahead since its agent started, of that"
            f" {decimal(node.used_bytes)} used and {decimal(node.wasted_bytes)} wasted;"
            f" {decimal(min(node.budget_bytes, node.agent_budget_bytes))} left in this hour",
            markup=False,
            soft_wrap=True,
        )
        table = Table("REVISION", "SIZE", "STATE", "WHY", box=box.SIMPLE)
        for order in node.orders:
            state = f"{order.state}: {order.message}" if order.message else order.state
            table.add_row(order.revision[:_SHOWN_DIGEST], decimal(order.size_bytes), Text(state), Text(order.reason))
        if node.orders:
            console.print(table)
    if not nodes:
        console.print("no storage agent is connected")
