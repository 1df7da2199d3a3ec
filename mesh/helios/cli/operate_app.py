"""What operators order of models and replicas: options and help of the program's own commands."""

from typing import Annotated, Final

import typer

from helios.cli import operate
from helios.cli.operate import EventOptions, Order
from helios.cli.options import DryRunOption, JsonOption, StateOption, console, run, state_of

app: Final = typer.Typer()

ModelArgument = Annotated[str, typer.Argument(help="Name or alias.")]
ReplicaArgument = Annotated[str, typer.Argument(help="Id of a replica; `helios status` lists them.")]


@app.command()
def preload(model: ModelArgument, state_dir: StateOption, *, dry_run: DryRunOption = False) -> None:
    """Start a replica of a model unless there is one; with --dry-run: where it would go."""
    run(operate.preload(Order(state_of(state_dir), console, dry_run), model))


@app.command()
def scale(
    model: ModelArgument,
    count: Annotated[int, typer.Argument(help="Replicas to keep; 0: none until a request comes.", min=0, max=1000)],
    state_dir: StateOption,
    *,
    dry_run: DryRunOption = False,
) -> None:
    """Set how many replicas a model has."""
    run(operate.scale(Order(state_of(state_dir), console, dry_run), model, count))


@app.command()
def evict(model: ModelArgument, state_dir: StateOption, *, dry_run: DryRunOption = False) -> None:
    """Stop a model's replicas and drop its weights from this node's cache."""
    run(operate.evict(Order(state_of(state_dir), console, dry_run), model))


@app.command()
def stage(model: ModelArgument, state_dir: StateOption, *, dry_run: DryRunOption = False) -> None:
    """Keep a model's weights in memory without a process: its next start reads no disk."""
    run(operate.stage(Order(state_of(state_dir), console, dry_run), model))


@app.command()
def unstage(model: ModelArgument, state_dir: StateOption, *, dry_run: DryRunOption = False) -> None:
    """Give the memory of a staged model back; the disk keeps its weights."""
    run(operate.unstage(Order(state_of(state_dir), console, dry_run), model))


@app.command("sleep")
def sleep_replica(replica: ReplicaArgument, state_dir: StateOption, *, dry_run: DryRunOption = False) -> None:
    """Take an idle replica off its GPU; the next request of its model wakes it."""
    run(operate.sleep_replica(Order(state_of(state_dir), console, dry_run), replica))


@app.command("wake")
def wake_replica(replica: ReplicaArgument, state_dir: StateOption, *, dry_run: DryRunOption = False) -> None:
    """Bring a sleeping replica back."""
    run(operate.wake_replica(Order(state_of(state_dir), console, dry_run), replica))


@app.command("reset-breaker")
def reset_breaker(replica: ReplicaArgument, state_dir: StateOption, *, dry_run: DryRunOption = False) -> None:
    """Have a replica picked again that failed too often."""
    run(operate.reset_breaker(Order(state_of(state_dir), console, dry_run), replica))


@app.command()
def events(
    state_dir: StateOption,
    *,
    model: Annotated[str, typer.Option(help="Only what happens to this model, by name or alias.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    is_json: JsonOption = False,
) -> None:
    """List what happened to workers and replicas: starts, states, breakers, scaling, the last few thousand."""
    run(operate.events(state_of(state_dir), console, EventOptions(model, follow, is_json)))
