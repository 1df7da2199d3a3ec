"""The command line: ``helios --help``."""

from typing import Annotated, Final

import typer

from helios.cli import cache_app, commands, keys_app, models_app, operate_app, workers, workers_app
from helios.cli import why as explanations
from helios.cli.options import JsonOption, StateOption, console, run, state_of
from helios.cli.state import StateDirectory
from helios.cli.topology import EMBEDDED_MODEL
from helios.cli.up import UpOptions

app: Final = typer.Typer(
    name="helios",
    help="Serverless LLM inference: many models behind one OpenAI-compatible address.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(models_app.app, name="models")
app.add_typer(cache_app.app, name="cache")
app.add_typer(keys_app.app, name="keys")
app.add_typer(workers_app.app, name="workers")
# Without a name its commands are the program's own.
app.add_typer(operate_app.app)


@app.command()
def up(
    state_dir: StateOption,
    *,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the mesh serves; it runs on.")] = False,
    host: Annotated[
        str, typer.Option(help="Address of the public listener; other than a loopback one, requests need API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the public listener.", min=1, max=65535)] = 8080,
    admin_port: Annotated[int, typer.Option(help="Port of the admin listener.", min=1, max=65535)] = 8081,
    model: Annotated[str, typer.Option(help="Model to have at hand; empty: none.")] = EMBEDDED_MODEL,
    proxies: Annotated[
        int, typer.Option(help="How many proxies: all pick, one leads, and another one when that dies.", min=1, max=8)
    ] = 1,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of a process, such as proxy.idle_timeout_seconds=60. May be repeated."),
    ] = None,
) -> None:
    """Run the whole mesh on this machine: registry, storage, worker, proxy and Envoy."""
    options = UpOptions(
        StateDirectory(state_dir.absolute()),
        host=host,
        port=port,
        admin_port=admin_port,
        model=model,
        proxies=proxies,
        overrides=tuple(setting or ()),
    )
    run(commands.up_detached(options, console) if detach else commands.up(options, console))


@app.command()
def down(
    state_dir: StateOption,
    *,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds to wait until it is gone; it goes on stopping after that. Default: as long as it may take.",
            min=1,
        ),
    ] = None,
) -> None:
    """Stop the mesh: requests end first.

    They get 20 s, then each process has its own time to end before it is killed: 5 s Envoy, 15 s more than
    worker.replica.drain_seconds (30) the worker, 15 s the others. All in all 105 s at most, and usually two.
    """
    run(commands.down(state_of(state_dir), console, timeout_seconds=timeout))


@app.command()
def status(state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """Show processes, workers, models and replicas."""
    run(commands.status(state_of(state_dir), console, is_json=is_json))


@app.command()
def chat(
    state_dir: StateOption,
    model: Annotated[str, typer.Argument(help="Name or alias.")] = "",
    *,
    message: Annotated[str, typer.Option("--message", "-m", help="Ask this, print the answer, and leave.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.", min=1)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; unset: the model's own default.", min=0)
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="HELIOS_API_KEY", help="API key, where the mesh requires one.", show_envvar=True)
    ] = "",
) -> None:
    """Talk to a model; answers stream."""
    turns = commands.Turns(message, max_tokens=max_tokens, temperature=temperature, api_key=api_key)
    run(commands.chat(state_of(state_dir), console, model, turns))


@app.command("scaling")
def scaling_decisions(
    state_dir: StateOption,
    model: Annotated[str, typer.Argument(help="Only this model's, by name or alias; empty: all.")] = "",
    *,
    count: Annotated[int, typer.Option("--limit", "-n", help="At most this many.", min=1, max=1000)] = 20,
    is_json: JsonOption = False,
) -> None:
    """List how many replicas models were to have, what asked for that, and why, the newest first."""
    run(workers.scaling(state_of(state_dir), console, model, count=count, is_json=is_json))


@app.command()
def why(
    state_dir: StateOption,
    request: Annotated[
        str, typer.Argument(help="The answer's x-request-id; with --last: a model, or nothing for any.")
    ] = "",
    *,
    last: Annotated[bool, typer.Option("--last", help="The last request that came.")] = False,
    is_json: JsonOption = False,
) -> None:
    """Show where a request's time went, and why."""
    run(explanations.why(state_of(state_dir), console, request, is_last=last, is_json=is_json))


@app.command()
def requests(
    state_dir: StateOption,
    *,
    model: Annotated[str, typer.Option(help="Only those for this model, by name or alias.")] = "",
    status: Annotated[str, typer.Option(help="Only held, sent, running, finished, refused or left ones.")] = "",
    count: Annotated[int, typer.Option("--count", "-n", help="How many, the newest.", min=1, max=1000)] = 20,
    is_json: JsonOption = False,
) -> None:
    """List the last requests, for helios why."""
    state = state_of(state_dir)
    run(explanations.requests(state, console, model=model, status=status, count=count, is_json=is_json))


@app.command()
def logs(
    state_dir: StateOption,
    process: Annotated[str, typer.Argument(help="registry, storage, worker, proxy, envoy or up; empty: all.")] = "",
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="Lines of each log.", min=0)] = 20,
) -> None:
    """Print the logs of the processes."""
    run(commands.logs(state_of(state_dir), console, process, is_following=follow, line_count=lines))
