"""What the launcher and the replica's process call to have vLLM: ``preload`` before the fork, ``build`` after it."""

import contextlib
import functools
from collections.abc import Callable

from helios.mesh.errors import HeliosError
from helios.worker.early.asking import Arrivals
from helios.worker.engines.vllm import compat, failures
from helios.worker.engines.vllm.arguments import engine_arguments
from helios.worker.engines.vllm.engine import VllmEngine
from helios.worker.engines.vllm.packing import packing_of
from helios.worker.replica.engine import Engine, EngineHooks
from helios.worker.replica.spec import ReplicaSpec


def preload() -> None:
    """Importing this module has imported everything; the rest is what needs no model."""
    compat.prepare_before_fork()


def prepare(spec: ReplicaSpec) -> Callable[[], None] | None:
    """Called in the launcher after a replica was forked, when there is nothing else to do: for the model's next one.

    Returns what takes longer, to be run in a child.
    """
    if not compat.HELD_TOKENIZERS.is_installed:
        return None
    if spec.early_door:
        # What is on its way can't be read here, where nothing may wait, and has another place when it is lent.
        return functools.partial(_pack_when_lent, spec)
    # A model that can't be run: its replica has said why.
    with contextlib.suppress(HeliosError, *failures.START_ERRORS):
        if not compat.HELD_TOKENIZERS.holds(spec.model_path):
            compat.HELD_TOKENIZERS.hold(engine_arguments(spec, -1).create_model_config())
        return packing_of(spec)
    return None


def _pack_when_lent(spec: ReplicaSpec) -> None:
    with contextlib.suppress(HeliosError, *failures.START_ERRORS):
        Arrivals(spec.early_door, spec.replica_id, spec.model_path).wait_whole()
        work = packing_of(spec)
        if work is not None:
            work()


def build(spec: ReplicaSpec, hooks: EngineHooks) -> Engine:
    """Loads the model of ``spec``. Raises HeliosErrors that say why a model can't be run."""
    try:
        return VllmEngine(spec, hooks)
    except failures.START_ERRORS as error:
        raise failures.start_error(error) from error
