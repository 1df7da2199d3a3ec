"""``helios cache nodes``: the storage agents that the registry knows, and what they fetch."""

import json
from collections.abc import Iterable
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from helios.cli.edge import open_admin
from helios.cli.state import StateDirectory
from helios.registry.client import StorageAgent, SyncClient


async def nodes(state: StateDirectory, console: Console, *, is_json: bool) -> None:
    """Shows the nodes whose agents are connected."""
    async with open_admin(state) as dialer:
        agents = await SyncClient(dialer).list_agents()
    if is_json:
        fields = [{**asdict(agent), "connected_at": agent.connected_at.isoformat()} for agent in agents]
        console.print_json(json.dumps(fields))
    else:
        console.print(node_table(agents) if agents else "no storage agent is connected")


def node_table(agents: Iterable[StorageAgent]) -> Table:
    """Returns a line for each node."""
    table = Table("NODE", "ADDRESS", "SINCE", "REVISIONS", "BLOBS", "FETCHES", box=box.SIMPLE)
    for agent in agents:
        table.add_row(
            Text(agent.node),
            Text(agent.address or "not reached by others"),
            agent.connected_at.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            str(agent.revision_count),
            str(agent.blob_count),
            str(len(agent.wanted_blobs)),
        )
    return table
