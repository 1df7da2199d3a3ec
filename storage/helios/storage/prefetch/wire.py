"""Between the messages of plans and reports and the agent's own types."""

from datetime import UTC

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.storage.prefetch.state import Order, Plan, Report


def plan_from_proto(message: pb.PrefetchPlan) -> Plan:
    """Returns a plan."""
    return Plan(
        orders=tuple(
            Order(order.revision, order.size_bytes, is_asked=order.is_asked, reason=order.reason)
            for order in message.orders
        ),
        uses={expected.revision: expected.uses for expected in message.expected_uses},
        expires_at=message.expires_at.ToDatetime(tzinfo=UTC),
    )


def report_to_proto(report: Report) -> pb.PrefetchReport:
    """Returns a report for the wire."""
    return pb.PrefetchReport(
        outcomes=[
            pb.PrefetchOutcome(
                revision=outcome.revision,
                state=pb.PrefetchState.ValueType(outcome.state),
                message=outcome.message,
            )
            for outcome in report.outcomes
        ],
        fetched_bytes=report.fetched_bytes,
        used_bytes=report.used_bytes,
        wasted_bytes=report.wasted_bytes,
        budget_bytes=report.budget_bytes,
    )
