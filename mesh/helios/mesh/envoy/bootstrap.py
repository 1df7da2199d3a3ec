"""The whole configuration, and how it gets to disk."""

import json
from pathlib import Path
from typing import Final

from envoy_data_plane.envoy.config.bootstrap.v3 import (
    Admin,
    Bootstrap,
    BootstrapDynamicResources,
    BootstrapStaticResources,
    Watchdog,
    Watchdogs,
)
from envoy_data_plane.envoy.config.core.v3 import (
    Node,
)
from envoy_data_plane.envoy.config.overload.v3 import (
    OverloadAction,
    OverloadManager,
    ResourceMonitor,
    ThresholdTrigger,
    Trigger,
)
from envoy_data_plane.envoy.extensions.resource_monitors.downstream_connections.v3 import DownstreamConnectionsConfig
from envoy_data_plane.envoy.extensions.resource_monitors.fixed_heap.v3 import FixedHeapConfig
from envoy_data_plane.google.protobuf import Any

from helios.mesh.envoy import clusters, pack
from helios.mesh.envoy.listeners import admin_listener, edge_listener
from helios.mesh.envoy.settings import EdgeSettings, Limits
from helios.mesh.envoy.tls import secret_files
from helios.mesh.files import write_private

CONFIG_NAME: Final = "envoy.json"
_HEAP: Final = "envoy.resource_monitors.fixed_heap"
# A thread of Envoy that does not come round for so long is stuck; nothing here blocks one for a tenth of it.
_STUCK_SECONDS: Final = 2.0
_CONNECTIONS: Final = "envoy.resource_monitors.global_downstream_max_connections"


def edge_config(settings: EdgeSettings) -> Bootstrap:
    """Returns Envoy's bootstrap: both listeners, all clusters, endpoints of replicas by delta ADS from the proxies.

    Raises:
        InvalidRequest: An address is not understood, or the descriptor set is missing.
    """
    # With several proxies each cluster of endpoints has a stream of its own.
    dynamic = None if settings.feeds else BootstrapDynamicResources(ads_config=clusters.endpoint_feed(clusters.PICKER))
    return Bootstrap(
        node=Node(id=settings.node_id, cluster="helios-edge"),
        static_resources=BootstrapStaticResources(
            listeners=[edge_listener(settings), admin_listener(settings)],
            clusters=clusters.all_clusters(settings),
        ),
        dynamic_resources=dynamic,
        admin=Admin(address=pack.address(settings.envoy_admin, socket_mode=0o600)),
        overload_manager=_overload(settings.limits),
        watchdogs=Watchdogs(main_thread_watchdog=_watchdog(), worker_watchdog=_watchdog()),
    )


def install(settings: EdgeSettings) -> Path:
    """Writes the configuration and the SDS files, mode 0600 (it holds the admin token), and returns its path.

    Each file is replaced by one rename; Envoy reads the configuration once, at its start.
    """
    settings.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for identity in (settings.edge_identity, settings.admin_identity):
        if identity is not None:
            for path, content in secret_files(settings.directory, identity).items():
                write_private(path, content.encode())
    path = settings.directory / CONFIG_NAME
    write_private(path, json.dumps(edge_config(settings).to_dict(), indent=1).encode())
    return path


def _watchdog() -> Watchdog:
    """Notes a thread that is stuck, in Envoy's statistics, and does no more.

    Each thread shows that it is alive twice in the shorter time, by default ten times a second: half of what an
    idle Envoy does.
    """
    return Watchdog(miss_timeout=pack.seconds(_STUCK_SECONDS), megamiss_timeout=pack.seconds(_STUCK_SECONDS * 5))


def _overload(limits: Limits) -> OverloadManager:
    heap = FixedHeapConfig(max_heap_size_bytes=limits.max_heap_bytes)
    connections = DownstreamConnectionsConfig(max_active_downstream_connections=limits.max_downstream_connections)
    return OverloadManager(
        resource_monitors=[
            ResourceMonitor(name=_HEAP, typed_config=Any.pack(heap)),
            ResourceMonitor(name=_CONNECTIONS, typed_config=Any.pack(connections)),
        ],
        actions=[
            _when_heap_reaches(0.90, "envoy.overload_actions.shrink_heap"),
            _when_heap_reaches(0.95, "envoy.overload_actions.stop_accepting_requests"),
        ],
    )


def _when_heap_reaches(ratio: float, action: str) -> OverloadAction:
    return OverloadAction(name=action, triggers=[Trigger(name=_HEAP, threshold=ThresholdTrigger(value=ratio))])
