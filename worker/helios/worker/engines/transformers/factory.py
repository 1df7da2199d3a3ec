"""What the launcher and the replica's process call to have a model of transformers."""

import importlib

import torch

from helios.worker.engines.transformers.engine import TransformersEngine
from helios.worker.replica.engine import Engine, EngineHooks
from helios.worker.replica.spec import ReplicaSpec

# transformers imports a model's code when it is first used; these are used most.
_PRELOADED_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def preload() -> None:
    """Imports the code of common models. Starts no thread, touches no device."""
    # A pool of threads that a parallel region starts here would be missing in the child, which then hangs.
    torch.set_num_threads(1)
    for model in _PRELOADED_MODELS:
        importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def build(spec: ReplicaSpec, hooks: EngineHooks) -> Engine:
    """Loads the model of ``spec``."""
    hooks.on_forked()
    return TransformersEngine(spec, hooks)
