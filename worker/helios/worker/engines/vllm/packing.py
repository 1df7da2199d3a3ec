"""When weights are mapped, and how the artifact that is mapped comes to be.

The launcher makes it: after a replica of a model that has none was forked and nothing else is to be done, it forks once
more. That child asks the supervisor whether another node has made one, which takes as long as it takes: nobody waits.
Where there is none it loads the model as a replica would, with the cores that others leave, and writes the artifact;
the next start maps it. The replica that serves meanwhile has nothing to do with it.
"""

import contextlib
import functools
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import structlog

from helios.mesh.errors import Corrupted, HeliosError, Unsupported
from helios.worker.artifacts.asking import refuse, take
from helios.worker.artifacts.requests import PACKED_WEIGHTS, ArtifactRequest
from helios.worker.engines.vllm import compat, compat_packed
from helios.worker.engines.vllm.arguments import arguments_of, engine_arguments
from helios.worker.replica.artifact_directory import ArtifactDirectory, drop
from helios.worker.replica.engine import EngineHooks
from helios.worker.replica.packed_weights import WEIGHTS, PackedInputs, begin_trial, find, has_failed, read_ahead
from helios.worker.replica.packed_writer import ArtifactWriter, has_room
from helios.worker.replica.priority import step_back, step_forward
from helios.worker.replica.scratch import make_scratch
from helios.worker.replica.settings import Role
from helios.worker.replica.spec import ReplicaSpec
from helios.worker.supervisor.host import usable_memory_bytes, used_memory_bytes

log = structlog.get_logger()

# Arguments that decide which tensors a model has. What else does is found by the digest of its skeleton.
_SHAPING: Final = ("dtype", "quantization", "tensor_parallel_size", "pipeline_parallel_size", "runner", "convert")
# What oneDNN is told of the processor in the environment decides into which form it packs, and which it can read.
_LIBRARY_SETTINGS: Final = ("ONEDNN_", "DNNL_")
# Below this, a load takes less than 0.05 s and there is little to share.
_LEAST_BYTES: Final = 64 << 20
# The tensors of the checkpoint, one that is packed, and the process itself.
_NEEDED_RATIO: Final = 1.25
_PROCESS_BYTES: Final = 512 << 20
# It holds a copy of the weights. Where others leave it nothing of the cores for so long, that is given back, and the
# next start tries again.
_PACK_SECONDS: Final = 600
# The supervisor keeps its own, shorter time.
_TAKE_SECONDS: Final = 590


def map_weights(arguments: Any, spec: ReplicaSpec, hooks: EngineHooks) -> ArtifactDirectory | None:
    """Has vLLM map the model's weights where there is an artifact of them.

    Args:
        arguments: AsyncEngineArgs of the spec; changed.
        spec: The replica.
        hooks: Told what the start uses.

    Returns:
        What is in use for as long as the replica lives; None for an ordinary load.
    """
    if not _can_map(arguments, spec):
        return None
    inputs = packing_inputs(spec)
    directory = Path(spec.packed_weights_directory, inputs.key)
    if has_failed(directory):
        # Whoever makes the next one removes it, and says so.
        log.warning("packed weights are not mapped: no start with them went well", directory=directory.name)
        return None
    try:
        taken = find(spec.packed_weights_directory, inputs)
        if taken is not None:
            read_ahead(taken.path)
    except Unsupported:
        return None
    except (Corrupted, OSError) as error:
        log.warning("packed weights are dropped: an ordinary load", error=str(error))
        with contextlib.suppress(OSError):
            drop(directory)
        return None
    if taken is not None:
        begin_trial(taken.path, spec.replica_id)
        hooks.artifacts.append(_request(spec, inputs))
        arguments.load_format = compat_packed.MAPPED_FORMAT
        arguments.model_loader_extra_config = {"directory": str(taken.path), "model": spec.model_path}
    return taken


def packing_of(spec: ReplicaSpec) -> Callable[[], None] | None:
    """Returns what is to be run in a child of the launcher to make the artifact; None where there is nothing to do."""
    if not spec.packed_weights_directory or not compat.is_pinned():
        return None
    directory = Path(spec.packed_weights_directory, packing_inputs(spec).key)
    is_there = directory.exists() and not has_failed(directory)
    if is_there or not _can_map(engine_arguments(spec, -1), spec):
        return None
    weights_bytes = _weights_bytes(spec)
    if spec.packed_weights_bytes is not None and weights_bytes > spec.packed_weights_bytes:
        # It would be removed as soon as nobody uses it, and made again after the next start.
        log.info("weights are not packed: more than may be kept", model=spec.model, weights_bytes=weights_bytes)
        return None
    needed_bytes = int(weights_bytes * _NEEDED_RATIO) + _PROCESS_BYTES
    # The replica that was forked a second ago may have touched nothing yet of what is booked for it.
    has_memory = used_memory_bytes() + spec.memory_bytes + needed_bytes <= usable_memory_bytes()
    if not has_memory:
        log.info("weights are not packed: not enough memory", model=spec.model, needed_bytes=needed_bytes)
        if not spec.artifact_door:
            return None
    if not has_room(spec.packed_weights_directory, weights_bytes):
        log.info("weights are not packed: not enough disk", model=spec.model, needed_bytes=weights_bytes)
        return None
    return functools.partial(_obtain, spec, may_pack=has_memory)


def packing_inputs(spec: ReplicaSpec) -> PackedInputs:
    """Returns what an artifact of the spec's weights depends on."""
    arguments = arguments_of(spec)
    flags: dict[str, Any] = {name: arguments[name] for name in _SHAPING if name in arguments}
    flags |= {
        name: value
        for name, value in os.environ.items()  # noqa: TID251  the library's, which has no other settings
        if name.startswith(_LIBRARY_SETTINGS) and not name.endswith("VERBOSE")
    }
    # Where vLLM lies is nothing to weights.
    surroundings = {name: value for name, value in compat.compile_surroundings().items() if name != "engine_path"}
    return PackedInputs(revision=spec.revision, flags=flags, **surroundings)


def _can_map(arguments: Any, spec: ReplicaSpec) -> bool:
    """Whether a replica of the spec would map an artifact.

    On devices there is nothing to map from a file. A compiler would look into the products. Ranks have parts of
    matrices: they load as ever.
    """
    return bool(
        spec.packed_weights_directory
        and compat.is_pinned()
        and compat.runs_eagerly()
        and arguments.enforce_eager
        and spec.settings.rank_count == 1
        and _weights_bytes(spec) >= _LEAST_BYTES
    )


def _obtain(spec: ReplicaSpec, *, may_pack: bool) -> None:
    """The whole life of the child: takes the artifact or, where it may, makes it."""
    step_back()
    # Where memory runs out all the same, the kernel ends this process and none that serves.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.alarm(_PACK_SECONDS)
    inputs = packing_inputs(spec)
    try:
        if not _take(spec, inputs) and may_pack:
            signal.alarm(_PACK_SECONDS)
            _pack(spec, inputs)
    except (BlockingIOError, FileNotFoundError):
        log.info("weights are being packed by another process", model=spec.model)
    except HeliosError as error:
        log.warning("weights not packed", model=spec.model, error=error.message)
    finally:
        # Ending takes locks of the kernel's that are the launcher's too, since it was forked from it: a fork that was
        # asked for would wait for a process that gets nothing of the cores.
        step_forward()


def _take(spec: ReplicaSpec, inputs: PackedInputs) -> bool:
    """Has the supervisor bring what another node made; returns whether it is there.

    Not again where what is there did no good: that is removed, and the supervisor told of it.
    """
    directory = Path(spec.packed_weights_directory, inputs.key)
    request = replace(_request(spec, inputs), replica_id="")
    if has_failed(directory):
        if spec.artifact_door:
            refuse(spec.artifact_door, request)
        drop(directory)
        return False
    return bool(spec.artifact_door) and take(spec.artifact_door, request, timeout_seconds=_TAKE_SECONDS)


def _request(spec: ReplicaSpec, inputs: PackedInputs) -> ArtifactRequest:
    return ArtifactRequest(PACKED_WEIGHTS, inputs.document, spec.revision, spec.replica_id)


def _pack(spec: ReplicaSpec, inputs: PackedInputs) -> None:
    make_scratch(os.getpid())
    with ArtifactWriter(spec.packed_weights_directory, inputs) as writer:
        try:
            size_bytes = _write(spec, writer)
        except Unsupported as error:
            writer.refuse(error.message)
            log.info("weights can't be packed", model=spec.model, reason=error.message)
        else:
            log.info("weights packed", model=spec.model, revision=spec.revision, size_bytes=size_bytes)


def _write(spec: ReplicaSpec, writer: ArtifactWriter) -> int:
    plain = replace(spec.settings, speculative_decoding=None, lora=None, kv_offload=None, role=Role.BOTH)
    init_method = f"file://{tempfile.gettempdir()}/group"
    path = compat.pack_weights(engine_arguments(replace(spec, settings=plain), -1), init_method, writer)
    return (path / WEIGHTS).stat().st_size


def _weights_bytes(spec: ReplicaSpec) -> int:
    return sum(path.stat().st_size for path in Path(spec.model_path).glob("*.safetensors"))
