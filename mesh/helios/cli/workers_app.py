"""``helios workers``: options and help of its commands."""

from typing import Annotated, Final

import typer

from helios.cli import workers
from helios.cli.options import DryRunOption, JsonOption, StateOption, console, run, state_of

app: Final = typer.Typer(help="Who runs replicas.", no_args_is_help=True)

WorkerArgument = Annotated[str, typer.Argument(help="A worker's id: `helios workers list`.")]


@app.command("list")
def workers_list(state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """List the workers that are connected."""
    run(workers.list_workers(state_of(state_dir), console, is_json=is_json))


@app.command("cordon")
def workers_cordon(state_dir: StateOption, worker: WorkerArgument, *, dry_run: DryRunOption = False) -> None:
    """Have nothing more started on a worker; what it holds goes on."""
    run(workers.change(state_of(state_dir), console, worker, "cordon", is_dry_run=dry_run))


@app.command("uncordon")
def workers_uncordon(state_dir: StateOption, worker: WorkerArgument, *, dry_run: DryRunOption = False) -> None:
    """Let replicas be started on a worker again."""
    run(workers.change(state_of(state_dir), console, worker, "uncordon", is_dry_run=dry_run))


@app.command("drain")
def workers_drain(state_dir: StateOption, worker: WorkerArgument, *, dry_run: DryRunOption = False) -> None:
    """Cordon a worker and drain its replicas: requests that run are finished, models in use start elsewhere."""
    run(workers.change(state_of(state_dir), console, worker, "drain", is_dry_run=dry_run))
