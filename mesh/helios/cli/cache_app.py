"""``helios cache``: options and help of its commands."""

from typing import Annotated, Final

import typer

from helios.cli import cache as cache_commands
from helios.cli.nodes import nodes as nodes_command
from helios.cli.options import JsonOption, StateOption, console, run, state_of
from helios.cli.prefetch import prefetch as prefetch_command

app: Final = typer.Typer(help="What this node's storage agent has.", no_args_is_help=True)

RevisionArgument = Annotated[str, typer.Argument(help="Name or alias of a model, or a revision's sha256:DIGEST.")]


@app.command("status")
def cache_status(state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """Show the tiers, what they did, and the revisions in them."""
    run(cache_commands.status(state_of(state_dir), console, is_json=is_json))


@app.command("nodes")
def cache_nodes(state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """Show the nodes whose storage agents the registry knows: they fetch models from each other."""
    run(nodes_command(state_of(state_dir), console, is_json=is_json))


@app.command("evict")
def cache_evict(revision: RevisionArgument, state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """Drop a revision that nobody uses from this node; `helios evict` stops a model's replicas first."""
    run(cache_commands.evict(state_of(state_dir), console, revision, is_json=is_json))


@app.command("prefetch")
def cache_prefetch(
    state_dir: StateOption,
    model: Annotated[str, typer.Argument(help="Name or alias; empty: show what nodes fetch ahead.")] = "",
    *,
    node: Annotated[str, typer.Option(help="Only this node. Default: all that are connected.")] = "",
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Only say who would be asked.")] = False,
    is_json: JsonOption = False,
) -> None:
    """Have nodes fetch a model before it is asked for; without a model, show what they fetch ahead, and why.

    Nodes are asked, not waited for. What a person asks for counts in no budget.
    """
    run(prefetch_command(state_of(state_dir), console, model, node=node, is_dry=is_dry, is_json=is_json))


@app.command("pin")
def cache_pin(revision: RevisionArgument, state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """Have a revision stay on this node once it is here."""
    run(cache_commands.pin(state_of(state_dir), console, revision, is_pinned=True, is_json=is_json))


@app.command("unpin")
def cache_unpin(revision: RevisionArgument, state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """Let a pinned revision be evicted again."""
    run(cache_commands.pin(state_of(state_dir), console, revision, is_pinned=False, is_json=is_json))


@app.command("scrub")
def cache_scrub(
    state_dir: StateOption,
    *,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Most bytes to read in a second. Default: no limit.", min=1)
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Read every blob from the disk and compare it with its name; mend or drop what is bad.

    Exits with 1 where something was.
    """
    run(cache_commands.scrub(state_of(state_dir), console, bytes_per_second=limit, is_json=is_json))
