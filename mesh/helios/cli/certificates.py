"""Certificates of a mesh on one machine: issued before any process starts, renewed while they run."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from helios.cli.state import StateDirectory
from helios.mesh.identity import LEAF_LIFETIME, CertificateAuthority, IdentityFiles, renewal_due

log = structlog.get_logger()

COMPONENTS: Final = ("registry", "storage", "worker", "proxy", "relay", "edge", "admin-edge")
_CHECK_SECONDS: Final = 60.0


def identity_of(state: StateDirectory, component: str) -> IdentityFiles:
    """Returns the leaf of a component."""
    return IdentityFiles(state.pki / component)


def issue_due(state: StateDirectory, *, lifetime: timedelta = LEAF_LIFETIME) -> list[str]:
    """Issues the leaves that are due, missing, or of another CA than the one in force; returns their components."""
    authority = CertificateAuthority.open(state.pki)
    now = datetime.now(UTC)
    leaves = {name: identity_of(state, name) for name in COMPONENTS}
    due = [name for name, leaf in leaves.items() if renewal_due(leaf, now=now) or leaf.ca.read_bytes() != authority.pem]
    for name in due:
        authority.issue(name, state.pki / name, lifetime=lifetime)
    return due


async def renew_forever(state: StateDirectory, *, lifetime: timedelta = LEAF_LIFETIME) -> None:
    """Renews leaves when they are due, until cancelled."""
    while True:
        await asyncio.sleep(min(_CHECK_SECONDS, lifetime.total_seconds() / 10))
        renewed = await asyncio.to_thread(issue_due, state, lifetime=lifetime)
        if renewed:
            log.info("certificates renewed", components=renewed)
