"""Which component may call what.

The server's policy keeps strangers out of the service; this table says what each of the rest may do. Reading is for
whoever takes part in serving models; changing models is for people, who come through the admin edge, and for the
proxy, through which replica counts are set (``ScaleModel`` writes to the registry). Artifacts are made by workers,
which run them: compiled code from anybody else would be a way into every worker.
"""

from typing import Any, Final, Protocol

from helios.mesh.errors import PermissionDenied
from helios.mesh.server import NO_TLS_COMPONENT, peer_component
from helios.registry.events import Mutation

SERVICE: Final = "helios.api.registry.v1.RegistryService"
PUSH_SERVICE: Final = "helios.api.registry.v1.PushService"
ARTIFACT_SERVICE: Final = "helios.api.registry.v1.ArtifactService"
CHUNK_SERVICE: Final = "helios.api.registry.v1.ChunkService"
VERSION_SERVICE: Final = "helios.api.registry.v1.VersionService"
SYNC_SERVICE: Final = "helios.api.registry.v1.SyncService"
KEY_SERVICE: Final = "helios.api.registry.v1.KeyService"
ROLLOUT_SERVICE: Final = "helios.api.registry.v1.RolloutService"
FOLLOW_SERVICE: Final = "helios.api.registry.v1.FollowService"
PROFILE_SERVICE: Final = "helios.api.registry.v1.ProfileService"
PREFETCH_SERVICE: Final = "helios.api.registry.v1.PrefetchService"
USAGE_SERVICE: Final = "helios.api.registry.v1.UsageService"
LEASE_SERVICE: Final = "helios.api.registry.v1.LeaseService"
CORDON_SERVICE: Final = "helios.api.registry.v1.CordonService"
# A storage agent and a proxy read; the admin edge acts for people.
POLICY: Final = {
    SERVICE: frozenset({"storage", "proxy", "admin-edge"}),
    ARTIFACT_SERVICE: frozenset({"worker", "admin-edge"}),
    CHUNK_SERVICE: frozenset({"storage"}),
    PUSH_SERVICE: frozenset({"admin-edge"}),
    # A proxy resolves the references that requests name.
    VERSION_SERVICE: frozenset({"proxy", "storage", "admin-edge"}),
    # People look; a session is for agents only. Another registry passes both on, and has looked who asks.
    SYNC_SERVICE: frozenset({"storage", "admin-edge", "registry"}),
    # People make and end keys, proxies know them by their hashes.
    KEY_SERVICE: frozenset({"proxy", "admin-edge"}),
    ROLLOUT_SERVICE: frozenset({"admin-edge"}),
    FOLLOW_SERVICE: frozenset({"admin-edge"}),
    # A proxy tells what replicas were measured to hold, and asks what others have.
    PROFILE_SERVICE: frozenset({"proxy", "admin-edge"}),
    # Proxies report and take advice, people look.
    USAGE_SERVICE: frozenset({"proxy", "admin-edge"}),
    # Proxies agree on who leads, people look.
    LEASE_SERVICE: frozenset({"proxy", "admin-edge"}),
    # People cordon at a proxy, which knows the workers.
    CORDON_SERVICE: frozenset({"proxy"}),
    PREFETCH_SERVICE: frozenset({"admin-edge", "registry"}),
}

_WRITERS: Final = frozenset({"admin-edge"})
_POLICY_WRITERS: Final = frozenset({"admin-edge", "proxy"})
_MEASURERS: Final = frozenset({"proxy"})
_PUBLISHERS: Final = frozenset({"worker"})
_AGENTS: Final = frozenset({"storage", "registry"})
_ORDERERS: Final = frozenset({"admin-edge", "registry"})
_KEY_WATCHERS: Final = frozenset({"proxy"})
_REPORTERS: Final = frozenset({"proxy"})
_LEADERS: Final = frozenset({"proxy"})


def check_may_write(context: Any) -> None:
    """Raises PermissionDenied unless the caller may change models."""
    _check(context, _WRITERS, "change models")


def check_may_set_policy(context: Any) -> None:
    """Raises PermissionDenied unless the caller may change replica counts."""
    _check(context, _POLICY_WRITERS, "change policies")


def check_may_measure(context: Any) -> None:
    """Raises PermissionDenied unless the caller may say what replicas hold."""
    _check(context, _MEASURERS, "report measures")


def check_may_publish(context: Any) -> None:
    """Raises PermissionDenied unless the caller may store artifacts."""
    _check(context, _PUBLISHERS, "store artifacts")


def check_may_report(context: Any) -> None:
    """Raises PermissionDenied unless the caller may say how much models are used."""
    _check(context, _REPORTERS, "report usage")


def check_may_manage_keys(context: Any) -> None:
    """Raises PermissionDenied unless the caller may make, list and end keys."""
    _check(context, _WRITERS, "manage keys")


def check_may_watch_keys(context: Any) -> None:
    """Raises PermissionDenied unless the caller may know what recognises keys."""
    _check(context, _KEY_WATCHERS, "watch keys")


def check_may_lead(context: Any) -> None:
    """Raises PermissionDenied unless the caller may hold leases and cordon workers."""
    _check(context, _LEADERS, "hold leases or cordon workers")


def check_is_agent(context: Any) -> None:
    """Raises PermissionDenied unless the caller may say what a node holds."""
    _check(context, _AGENTS, "speak for a node")


def check_may_order(context: Any) -> None:
    """Raises PermissionDenied unless the caller may have nodes fetch ahead."""
    _check(context, _ORDERERS, "order prefetches")


class MutationRequest(Protocol):
    """What every request that changes models has."""

    @property
    def request_id(self) -> str:
        """Names it, so that it is carried out once."""
        ...

    @property
    def expected_version(self) -> int:
        """The version of the model that the caller has seen."""
        ...

    @property
    def dry_run(self) -> bool:
        """Whether it is only asked what would be."""
        ...


def mutation_of(context: Any, request: MutationRequest) -> Mutation:
    """Returns how a change is asked for, and by whom."""
    return Mutation(actor_of(context), request.request_id, request.expected_version, is_dry_run=request.dry_run)


def actor_of(context: Any) -> str:
    """Returns by whom a change is asked for."""
    return peer_component(context) or ""


def is_worker(context: Any) -> bool:
    """Returns whether the caller is surely a worker."""
    return peer_component(context) in _PUBLISHERS


def is_person(context: Any) -> bool:
    """Returns whether the call is surely a person's, whose looking at an artifact is not use of it."""
    return peer_component(context) in _WRITERS


def _check(context: Any, allowed: frozenset[str], what: str) -> None:
    component = peer_component(context)
    # Without TLS the sidecar has already decided who may connect.
    if component not in allowed and component != NO_TLS_COMPONENT:
        raise PermissionDenied(f"{component} may not {what}", metadata={"component": component or ""})
