"""The audit log: who changed what, and when. One line of the process's log for each change that was carried out.

Lines have the message ``audit`` and never a secret: callers name the fields that they tell. The actor is the caller's
component, which for people is the edge that they came through (`admin-edge`), whose access log has their address.
"""

from typing import Final

import structlog

log = structlog.get_logger()

AUDIT_MESSAGE: Final = "audit"


def audit(what: str, *, actor: str, **fields: object) -> None:
    """Notes a change: ``what`` was done ("revoke key"), by whom, and to what."""
    log.info(AUDIT_MESSAGE, what=what, actor=actor, **fields)
