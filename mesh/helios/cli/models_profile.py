"""``helios models profile``: what a model needs of devices, how it can be split, and what its replicas held."""

import json
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from helios.api.registry.v1 import profile_service_pb2 as pb
from helios.cli.edge import open_admin
from helios.cli.state import StateDirectory
from helios.cli.transfer_progress import size
from helios.mesh.channel import StubSource
from helios.mesh.errors import PreconditionFailed
from helios.registry.client import ProfileClient

_SETTINGS_CHARS: Final = 12


async def profile(state: StateDirectory, console: Console, reference: str, *, has_plan: bool, is_json: bool) -> None:
    """Shows the profile of the revision that a reference means."""
    async with open_admin(state) as dialer:
        found = await ProfileClient(dialer).get(reference, has_plan=has_plan)
    if is_json:
        console.print_json(json.dumps(MessageToDict(found, preserving_proto_field_name=True)))
        return
    for part in _drawn(found):
        console.print(part, highlight=False)
    if has_plan and not found.HasField("plan"):
        console.print(f"no plan: {found.plan_error}", markup=False, highlight=False)


async def summary_of(dialer: StubSource, reference: str) -> dict[str, Any]:
    """Returns the short form for ``helios models show``; empty for an adapter."""
    try:
        found = await ProfileClient(dialer).get(reference)
    except PreconditionFailed:
        return {}
    return {
        "weights_by_dtype": dict(found.weights_by_dtype),
        "tensor_parallel": list(found.tensor_parallel_options),
        "pipeline_parallel": list(found.pipeline_parallel_options),
        "fits": {fit.device: _gang(fit) for fit in found.fits},
        "measured_bytes": [measure.fixed_bytes for measure in found.measures],
    }


def _drawn(found: pb.GetProfileResponse) -> list[Table]:
    facts = Table(show_header=False, box=None)
    dtypes = ", ".join(f"{size(count)} {name}" for name, count in sorted(found.weights_by_dtype.items()))
    head = size(found.head_bytes) if found.head_bytes else "the embeddings'"
    facts.add_row("weights", dtypes)
    facts.add_row("layers", f"{len(found.layer_bytes)}, {size(max(found.layer_bytes, default=0))} the largest")
    facts.add_row("embeddings", f"{size(found.embedding_bytes)}; output layer: {head}")
    facts.add_row("ranks of a layer", ", ".join(map(str, found.tensor_parallel_options)))
    facts.add_row("stages", ", ".join(map(str, found.pipeline_parallel_options)))
    facts.add_row("KV cache", f"{found.revision.profile.kv_bytes_per_token:,} bytes a token")
    for measure in found.measures:
        where = "a GPU" if measure.is_gpu else "a CPU"
        facts.add_row(
            "measured", f"{size(measure.fixed_bytes)} on {where} ({measure.settings_sha256[:_SETTINGS_CHARS]})"
        )
    fits = Table("device", "how many", "each takes", "KV cache", box=None)
    for fit in found.fits:
        fits.add_row(fit.device, _gang(fit), size(fit.needed_bytes), f"{size(fit.kv_bytes)}, {fit.kv_tokens:,} tokens")
    if not found.HasField("plan"):
        return [facts, fits]
    modules = Table("module", "bytes", box=None)
    for module in (*found.plan.blocks, *found.plan.others):
        modules.add_row(module.name, size(module.size_bytes))
    facts.add_row("stay whole", ", ".join(found.plan.no_split_classes) or "no module")
    return [facts, fits, modules]


def _gang(fit: pb.DeviceFit) -> str:
    count = fit.tensor_parallel * fit.pipeline_parallel
    if count == 1:
        return "1"
    return f"{count} (tensor_parallel={fit.tensor_parallel}, pipeline_parallel={fit.pipeline_parallel})"
