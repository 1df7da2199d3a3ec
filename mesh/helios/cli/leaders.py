"""Which of several proxies leads, for `helios status`."""

from helios.cli.edge import EdgeDialer
from helios.mesh.errors import HeliosError
from helios.mesh.names import PROXY_LEASE
from helios.registry.client import LeaseClient, ToldLease


async def leases_of(dialer: EdgeDialer) -> list[ToldLease]:
    """Returns the leases that the registry knows; none where it does not answer: what else runs is worth showing."""
    try:
        return await LeaseClient(dialer).list()
    except HeliosError:
        return []


def leader_line(leases: list[ToldLease]) -> str:
    """Returns who leads, for people; empty where there are no leases."""
    lease = next((lease for lease in leases if lease.name == PROXY_LEASE), None)
    if lease is None:
        return ""
    if not lease.holder:
        return f"no proxy leads (the last one had epoch {lease.epoch})"
    return f"{lease.holder} leads the proxies (epoch {lease.epoch})"
