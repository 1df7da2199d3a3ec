"""How a replica that was forked before all of its model is here starts vLLM."""

from typing import Any

import structlog

from helios.worker.early.asking import Arrivals
from helios.worker.engines.vllm import compat, compat_early, compat_packed
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()


def load_early(arguments: Any, spec: ReplicaSpec) -> None:
    """Has vLLM load the weights as they come; waits until they are lent where it would not load them by our loader.

    Args:
        arguments: AsyncEngineArgs of the spec, as they are otherwise; changed.
        spec: The replica.

    Raises:
        Unavailable: The fetch, or the replica, came to its end.
    """
    if not spec.early_door:
        return
    early = {"door": spec.early_door, "replica_id": spec.replica_id, "model": spec.model_path}
    if compat.is_pinned() and arguments.load_format == compat_packed.MAPPED_FORMAT:
        # Read only where what is mapped turns out not to fit.
        arguments.model_loader_extra_config = {**arguments.model_loader_extra_config, "early": early}
    elif compat.is_pinned() and arguments.load_format == "auto":
        arguments.load_format = compat_early.EARLY_FORMAT
        arguments.model_loader_extra_config = early
    else:
        log.info("the model is loaded when all of it is here", load_format=arguments.load_format)
        Arrivals(spec.early_door, spec.replica_id, spec.model_path).wait_whole()
