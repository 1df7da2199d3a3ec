"""What the launcher and the replica's process call to have a user's class."""

import contextlib
import importlib

from helios.worker.engines.custom.lit_engine import LitEngine
from helios.worker.engines.custom.loading import find_target, make_engine, make_lit_api
from helios.worker.replica.engine import Engine, EngineHooks
from helios.worker.replica.engines import CLASS_OPTION
from helios.worker.replica.spec import ReplicaSpec


def preload() -> None:
    """Imports litserve, which takes a second, where it is installed.

    The user's module is imported in the replica: it may start threads, and every start takes it as it is by then.
    """
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("litserve")


def build(spec: ReplicaSpec, hooks: EngineHooks) -> Engine:
    """Makes an instance of the class that the options name. Raises HeliosErrors that say what its code failed with."""
    hooks.on_forked()
    target = find_target(spec.options.get(CLASS_OPTION, ""))
    made = make_lit_api(target, spec)
    if made is None:
        engine: Engine = make_engine(target, spec, hooks)
        return engine
    api, options = made
    return LitEngine(api, options, spec, hooks)
