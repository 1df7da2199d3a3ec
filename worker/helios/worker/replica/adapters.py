"""LoRA adapters of a replica: loaded into the running engine before the first request may name them.

They are models of their own in the registry, and their files are on the node by a lease of their own, which the
supervisor holds while the replica lives: an engine may drop an adapter from memory and read it again.
"""

from typing import Any

import structlog

from helios.mesh.errors import PreconditionFailed
from helios.worker.replica.engine import Engine
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()


async def load_adapters(engine: Engine, spec: ReplicaSpec) -> None:
    """Loads what the settings name.

    Raises:
        PreconditionFailed: ADAPTERS_UNSUPPORTED, the engine has none; ADAPTER_MISSING, its files are not on the node;
            BAD_ADAPTER, the engine can't use it.
    """
    adapters = spec.settings.lora.adapters if spec.settings.lora is not None else ()
    if not adapters:
        return
    adapting: Any = engine
    if not hasattr(adapting, "load_adapter"):
        raise PreconditionFailed(f"the engine {spec.engine} has no LoRA adapters", reason="ADAPTERS_UNSUPPORTED")
    for adapter in adapters:
        path = spec.revision_paths.get(adapter.revision)
        if path is None:
            raise PreconditionFailed(
                f"the adapter {adapter.name!r} ({adapter.model}) is not on the node", reason="ADAPTER_MISSING"
            )
        await adapting.load_adapter(adapter.name, path)
        log.info("adapter loaded", adapter=adapter.name, model=adapter.model, revision=adapter.revision)
