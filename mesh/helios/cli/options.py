"""What all commands share: where the mesh is, how they print, how they fail."""

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

import grpc.aio
import typer
from rich.console import Console
from rich.text import Text

from helios.cli.state import StateDirectory
from helios.cli.topology import default_state_directory
from helios.mesh.errors import HeliosError
from helios.mesh.status import error_from_rpc

T = TypeVar("T")

console: Final = Console()

errors: Final = Console(stderr=True)

StateOption = Annotated[
    Path,
    typer.Option(
        "--state-dir",
        envvar="HELIOS_STATE_DIR",
        help="Directory of the mesh: certificates, models, logs, sockets.",
        show_default="$XDG_STATE_HOME/helios",
        default_factory=default_state_directory,
    ),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

NOTHING_DONE: Final = "nothing was done; it would be: "
"""What stands before what a dry run tells."""
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and do nothing.")]


def state_of(path: Path) -> StateDirectory:
    """The mesh's directory, whatever the working directory is later."""
    return StateDirectory(path.absolute())


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a command to its end; an error is told on stderr, or as JSON where that was asked for, and exits with 1."""
    try:
        return asyncio.run(work)
    except HeliosError as error:
        _fail(error)
    except grpc.aio.AioRpcError as error:
        _fail(error_from_rpc(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(error: HeliosError) -> NoReturn:
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": {"reason": error.reason, "message": error.message}}) + "\n")
    else:
        # Messages name settings, packages and what engines said: "vllm[audio]" is no markup.
        told = Text.assemble(("error", "bold red"), f" {error.message} ", (f"({error.reason})", "dim"))
        errors.print(told, soft_wrap=True)
    raise typer.Exit(1)
