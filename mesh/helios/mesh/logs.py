"""Structured logs: one JSON object a line on standard error, a constant message and fields.

structlog is used rather than the standard library alone because fields are bound once and travel with the logger;
records of libraries go through the same renderer, so a log file has one form.
"""

import logging
import sys
from typing import Any, Literal

import structlog
from opentelemetry import trace

Level = Literal["debug", "info", "warning", "error"]


def setup_logs(*, process: str, level: Level = "info") -> None:
    """Sends the logs of this process and of its libraries to standard error as JSON."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _Process(process),
        _add_trace,
    ]
    structlog.configure(
        processors=[
            *shared,
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(), structlog.processors.format_exc_info],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.EventRenamer("message"),
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries report only what goes wrong, whatever our own level.
    root.setLevel(logging.WARNING)
    logging.getLogger("helios").setLevel(getattr(logging, level.upper()))


class _Process:
    def __init__(self, process: str) -> None:
        self._process = process

    def __call__(self, _logger: Any, _name: str, event: dict[str, Any]) -> dict[str, Any]:
        event["process"] = self._process
        return event


def _add_trace(_logger: Any, _name: str, event: dict[str, Any]) -> dict[str, Any]:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = format(context.trace_id, "032x")
        event["span_id"] = format(context.span_id, "016x")
    return event
