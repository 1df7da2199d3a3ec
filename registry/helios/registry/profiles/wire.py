"""Profiles as messages."""

from helios.api.registry.v1 import profile_service_pb2 as pb
from helios.registry import wire
from helios.registry.profiles.measure import measure_to_proto
from helios.registry.profiles.planner import Plan
from helios.registry.profiles.profiles import FullProfile


def profile_to_proto(profile: FullProfile) -> pb.GetProfileResponse:
    """Returns a profile on the wire."""
    layout = profile.layout
    return pb.GetProfileResponse(
        revision=wire.revision_to_proto(profile.revision),
        weights_by_dtype=dict(layout.by_dtype),
        layer_bytes=layout.blocks,
        embedding_bytes=layout.embedding_bytes,
        head_bytes=layout.head_bytes,
        other_bytes=layout.other_bytes,
        tensor_parallel_options=profile.tensor_parallel,
        pipeline_parallel_options=profile.pipeline_parallel,
        fits=[
            pb.DeviceFit(
                device=fit.device,
                device_bytes=fit.device_bytes,
                tensor_parallel=fit.tensor_parallel,
                pipeline_parallel=fit.pipeline_parallel,
                needed_bytes=fit.needed_bytes,
                kv_bytes=fit.kv_bytes,
                kv_tokens=fit.kv_tokens,
            )
            for fit in profile.fits
        ],
        plan=_plan_to_proto(profile.plan) if profile.plan is not None else None,
        plan_error=profile.why_no_plan,
        measures=[measure_to_proto(measure).measure for measure in profile.measures],
    )


def _plan_to_proto(plan: Plan) -> pb.ModulePlan:
    return pb.ModulePlan(
        model_class=plan.model_class,
        no_split_classes=plan.no_split_classes,
        blocks=[pb.ModuleSize(name=name, size_bytes=size) for name, size in plan.blocks],
        others=[pb.ModuleSize(name=name, size_bytes=size) for name, size in plan.others],
        tied=[pb.TiedParameters(names=names) for names in plan.tied],
        total_bytes=plan.total_bytes,
    )
