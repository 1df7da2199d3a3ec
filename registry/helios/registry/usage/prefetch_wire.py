"""Between the messages of prefetches and the registry's own types."""

from helios.api.registry.v1 import sync_service_pb2
from helios.registry.usage.prefetch_plan import Plan


def plan_to_proto(plan: Plan) -> sync_service_pb2.PrefetchPlan:
    """Returns a plan for the wire."""
    message = sync_service_pb2.PrefetchPlan(
        orders=[
            sync_service_pb2.PrefetchOrder(
                revision=order.revision, size_bytes=order.size_bytes, is_asked=order.is_asked, reason=order.reason
            )
            for order in plan.orders
        ],
        expected_uses=[sync_service_pb2.ExpectedUses(revision=revision, uses=uses) for revision, uses in plan.uses],
    )
    message.expires_at.FromDatetime(plan.expires_at)
    return message
