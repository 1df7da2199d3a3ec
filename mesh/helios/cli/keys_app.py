"""``helios keys``: options and help of its commands."""

from typing import Annotated, Final

import typer

from helios.cli import keys
from helios.cli.options import JsonOption, StateOption, console, run, state_of
from helios.registry.client import KeySpec

app: Final = typer.Typer(help="API keys of clients.", no_args_is_help=True)


@app.command("create")
def keys_create(  # noqa: PLR0913 - one for each option
    name: Annotated[str, typer.Argument(help="Name of the key: lower-case letters, digits and hyphens.")],
    state_dir: StateOption,
    *,
    tenant: Annotated[str, typer.Option(help="Whose it is: keys of one tenant share its place in queues.")] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="Model that it may use, such as 'smol*'. May be repeated. Default: all.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests a minute; 0: no limit.", min=0, max=2**32 - 1)] = 0,
    tokens: Annotated[
        int, typer.Option(help="Tokens a minute, of prompts and answers; 0: no limit.", min=0, max=2**32 - 1)
    ] = 0,
    priority: Annotated[str, typer.Option(help="Who goes first where there is a queue: low, normal, high.")] = "normal",
    weight: Annotated[int, typer.Option(help="The tenant's share of a busy model.", min=1, max=1000)] = 1,
    expires: Annotated[str, typer.Option(help="When it ends, from now: 90s, 15m, 12h, 30d. Default: never.")] = "",
    is_json: JsonOption = False,
) -> None:
    """Make an API key and print it; it is not shown again."""

    async def make() -> None:
        spec = KeySpec(
            name,
            tenant,
            tuple(model or ()),
            requests_per_minute=requests,
            tokens_per_minute=tokens,
            priority=keys.priority_of(priority),
            weight=weight,
            ttl=keys.duration_of(expires),
        )
        await keys.create(state_of(state_dir), console, spec, is_json=is_json)

    run(make())


@app.command("list")
def keys_list(
    state_dir: StateOption,
    *,
    show_ended: Annotated[bool, typer.Option("--all", help="Also those that are revoked or expired.")] = False,
    is_json: JsonOption = False,
) -> None:
    """List the API keys."""
    run(keys.list_keys(state_of(state_dir), console, show_ended=show_ended, is_json=is_json))


@app.command("revoke")
def keys_revoke(
    key: Annotated[str, typer.Argument(help="Name or id of the key.")],
    state_dir: StateOption,
    *,
    is_json: JsonOption = False,
) -> None:
    """End an API key, everywhere, within a second."""
    run(keys.revoke(state_of(state_dir), console, key, is_json=is_json))
