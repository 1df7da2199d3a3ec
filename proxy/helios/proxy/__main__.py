"""The proxy process: the composition root of `python -m helios.proxy`."""

import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from typing import Final
from uuid import uuid4

from helios.api.admin.v1.admin_service_pb2_grpc import (
    AdminServiceServicer,
    add_AdminServiceServicer_to_server,
)
from helios.api.catalog.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from helios.api.fleet.v1.fleet_service_pb2_grpc import add_FleetServiceServicer_to_server
from helios.api.fleet.v1.replacement_service_pb2_grpc import add_ReplacementServiceServicer_to_server
from helios.api.proxy.v1.feed_service_pb2_grpc import add_FeedServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.identity import SpiffeId
from helios.mesh.process import Lifetime, run
from helios.mesh.server import HEALTH_SERVICE, MeshServer, ServerOptions
from helios.mesh.tasks import keep_running
from helios.mesh.xds.server import XdsServer
from helios.mesh.xds.state import CLUSTER
from helios.proxy.admin.servicer import ADMIN_SERVICE, AdminServicer
from helios.proxy.admission.session import watch_keys
from helios.proxy.catalog.servicer import MODEL_SERVICE, ModelServicer
from helios.proxy.catalog.session import ModelSource, NoRegistry, RegistryClients, RegistrySession
from helios.proxy.core import Core
from helios.proxy.explain.journal import JournalLimits
from helios.proxy.fleet.feed import FEED_SERVICE, Feed, FeedServicer, FeedSession
from helios.proxy.fleet.servicer import FLEET_SERVICE, FleetServicer
from helios.proxy.measures import MeasureExchange
from helios.proxy.peers.group import PEER_SERVICE, PeerGroup
from helios.proxy.picker import renewing
from helios.proxy.picker.ads import EdgeStreams, GuardedXds
from helios.proxy.picker.check import METHOD, CheckPicker
from helios.proxy.picker.choosing import Chooser
from helios.proxy.picker.request import INFERENCE_PREFIX, OPENAI_PREFIX
from helios.proxy.picker.servicer import PickerServicer
from helios.proxy.picker.unreached import UnreachedServicer
from helios.proxy.reflection import REFLECTION_SERVICES, ReflectionServicer
from helios.proxy.replacement.servicer import REPLACEMENT_SERVICE, ReplacementServicer
from helios.proxy.runtime import Runtime
from helios.proxy.scaling.forecast import Expected, WarmPoolMode
from helios.proxy.settings import ProxySettings
from helios.proxy.store import (
    Store,
    load_cordons,
    load_decisions,
    load_keys,
    load_models,
    load_starts,
    load_swap_failures,
    load_usage,
    load_workers,
)
from helios.proxy.usage.advice import watch_advice
from helios.proxy.usage.reporter import UsageReporter
from helios.registry.client import CordonClient, KeyClient, ProfileClient, RegistryClient, UsageClient, VersionClient

_EDGES: Final = frozenset({"edge", "admin-edge"})
_CONTROL_POLICY: Final = {
    FLEET_SERVICE: frozenset({"worker"}),
    # Proxies pass on what the relay tells and what operators ask.
    REPLACEMENT_SERVICE: frozenset({"relay", "proxy"}),
    MODEL_SERVICE: _EDGES,
    ADMIN_SERVICE: frozenset({"admin-edge", "proxy"}),
    PEER_SERVICE: frozenset({"proxy"}),
    FEED_SERVICE: frozenset({"proxy"}),
    HEALTH_SERVICE: frozenset({"*"}),
    **dict.fromkeys(REFLECTION_SERVICES, _EDGES),
}
# Requests wait for this call, and only while the registry's watch is broken.
_FIND_TIMEOUT_SECONDS: Final = 3.0


async def main(settings: ProxySettings, lifetime: Lifetime) -> None:
    """Runs the proxy until it is asked to stop."""
    directory = settings.state_directory
    core = Core(
        settings.core_policy(),
        new_id=lambda: uuid4().hex,
        known_workers=load_workers(directory),
        now=time.monotonic(),
    )
    wall_offset = datetime.now(UTC).timestamp() - time.monotonic()
    core.lifecycle.wants.set_clock(wall_offset, time.monotonic())
    core.lifecycle.wants.decisions.restore(load_decisions(directory, wall_offset))
    core.lifecycle.swaps.restore(load_swap_failures(directory))
    load_starts(directory, core.lifecycle.promises.estimates)
    core.models_replaced(load_models(directory), time.monotonic(), is_synced=False)
    if (keys := load_keys(directory)) is not None:
        core.keyring.replace(keys)
    store = Store(directory, core.catalogue)
    xds = XdsServer()
    streams = EdgeStreams(own=_own_id(settings))
    limits = JournalLimits(settings.explain.request_count, settings.explain.total_bytes)
    runtime = Runtime(core, publisher=xds, memory=store, journal_limits=limits)
    runtime.cordons.restore(*load_cordons(directory))
    async with AsyncExitStack() as stack:
        models = await _registry(settings, lifetime, stack, runtime, store)
        peers = await _peers(settings, stack, runtime)
        lifetime.group.create_task(runtime.run(), name="runtime")
        lifetime.group.create_task(store.run(), name="store")
        picker = await stack.enter_async_context(_picker(settings, runtime, models, xds, streams))
        feed = Feed() if peers is not None else None
        fleet = FleetServicer(
            runtime,
            proxy_id=settings.proxy_id,
            report_interval_seconds=settings.fleet.report_interval_seconds,
            feed=feed,
        )
        control = await stack.enter_async_context(_control(settings, runtime, models, fleet, peers=peers, feed=feed))
        if settings.feed_target:
            dialer = Dialer(settings.feed_target, identity=settings.mesh.identity, peer="proxy")
            following = FeedSession(runtime, await stack.enter_async_context(dialer), fleet.take)
            lifetime.group.create_task(keep_running("feed", following.run, cap_seconds=1), name="feed")
        if peers is not None:
            peers.start(lifetime.group, settings.peers.address or control.address)
        lifetime.mark_ready(picker_address=picker.address, control_address=control.address)
        await lifetime.wait_stop()
        runtime.stop()
        if peers is not None:
            await peers.stop()
        streams.close()


async def _registry(
    settings: ProxySettings, lifetime: Lifetime, stack: AsyncExitStack, runtime: Runtime, store: Store
) -> ModelSource:
    if not settings.registry_target:
        return NoRegistry()
    dialer = await stack.enter_async_context(
        Dialer(settings.registry_target, identity=settings.mesh.identity, peer="registry")
    )
    clients = RegistryClients(
        steady=RegistryClient(dialer),
        quick=RegistryClient(dialer, timeout_seconds=_FIND_TIMEOUT_SECONDS),
        versions=VersionClient(dialer, timeout_seconds=_FIND_TIMEOUT_SECONDS),
    )
    session = RegistrySession(clients, runtime, store)
    lifetime.group.create_task(keep_running("watch models", session.watch, cap_seconds=1), name="watch models")
    watching = partial(watch_keys, KeyClient(dialer), runtime.core.keyring, store)
    lifetime.group.create_task(keep_running("watch keys", watching, cap_seconds=1), name="watch keys")
    _report_usage(settings, lifetime, stack, runtime, store, client=UsageClient(dialer))
    runtime.cordons.use(CordonClient(dialer))
    cordons = keep_running("watch cordons", runtime.cordons.watch, cap_seconds=1)
    lifetime.group.create_task(cordons, name="watch cordons")
    measures = MeasureExchange(runtime.core.lifecycle.room.measured, runtime.core.catalogue, ProfileClient(dialer))
    lifetime.group.create_task(keep_running("exchange measures", measures.run), name="exchange measures")
    return session


def _report_usage(
    settings: ProxySettings,
    lifetime: Lifetime,
    stack: AsyncExitStack,
    runtime: Runtime,
    store: Store,
    *,
    client: UsageClient,
) -> None:
    reporter = UsageReporter(
        runtime.meter,
        client,
        store,
        load_usage(settings.state_directory),
        interval_seconds=settings.usage.report_interval_seconds,
    )
    # After the servers have drained, while the registry can be reached.
    stack.push_async_callback(reporter.close)
    reporting = lifetime.group.create_task(keep_running("report usage", reporter.run), name="report usage")
    stack.callback(reporting.cancel)

    def take(expected: Mapping[str, Expected]) -> None:
        runtime.apply(runtime.core.expect(expected, time.monotonic()))

    watching = partial(watch_advice, client, take, time.monotonic)
    if settings.usage.warm_pool is not WarmPoolMode.OFF:
        lifetime.group.create_task(keep_running("watch advice", watching), name="watch advice")


async def _peers(settings: ProxySettings, stack: AsyncExitStack, runtime: Runtime) -> PeerGroup | None:
    if not (settings.peers.lease or settings.feed_target) or not settings.registry_target:
        return None
    peers = PeerGroup(
        runtime,
        registry_target=settings.registry_target,
        identity=settings.mesh.identity,
        proxy_id=settings.proxy_id,
        ttl_seconds=settings.peers.ttl_seconds,
        feed_target=settings.feed_target,
    )
    return await stack.enter_async_context(peers)


def _picker(
    settings: ProxySettings, runtime: Runtime, models: ModelSource, xds: XdsServer, streams: EdgeStreams
) -> MeshServer:
    identity = settings.mesh.identity
    # Envoy's calls of the picker have the same headers, request for request.
    options = ServerOptions(
        intercept=False, drain_seconds=settings.drain_seconds, transport="http2", header_table_bytes=0
    )
    server = MeshServer(listen=settings.picker_listen, identity=identity, policy={}, options=options)
    chooser = Chooser(runtime, cluster=settings.replica_cluster)
    server.answer_at_once(METHOD, CheckPicker(runtime, chooser, own=_own_id(settings)).answer)
    server.answer_at_once(renewing.METHOD, renewing.Renewing(runtime, own=_own_id(settings)).answer)
    picker = PickerServicer(
        runtime, models, chooser=chooser, hold_limit_seconds=settings.hold.limit_seconds, own=_own_id(settings)
    )
    picker.add_to(server.grpc)
    GuardedXds(xds, streams).add_to(server.grpc)
    UnreachedServicer(runtime, streams, cluster=settings.replica_cluster or CLUSTER).add_to(server.grpc)
    return server


def _own_id(settings: ProxySettings) -> SpiffeId | None:
    identity = settings.mesh.identity
    return identity.spiffe_id() if identity is not None else None


def _control(
    settings: ProxySettings,
    runtime: Runtime,
    models: ModelSource,
    fleet: FleetServicer,
    *,
    peers: PeerGroup | None,
    feed: Feed | None,
) -> MeshServer:
    # Sessions say little and often: grpc.aio wakes four threads for each word.
    options = ServerOptions(drain_seconds=settings.drain_seconds, transport="http2")
    server = MeshServer(
        listen=settings.control_listen, identity=settings.mesh.identity, policy=_CONTROL_POLICY, options=options
    )
    add_FleetServiceServicer_to_server(fleet, server.grpc)
    calls = peers.calls if peers is not None else None
    replacements = ReplacementServicer(runtime, models, hold_limit_seconds=settings.hold.limit_seconds, peers=calls)
    add_ReplacementServiceServicer_to_server(replacements, server.grpc)
    add_ModelServiceServicer_to_server(ModelServicer(runtime, models), server.grpc)
    admin: AdminServiceServicer = AdminServicer(runtime, models)
    if peers is not None:
        admin = peers.share(admin)
    add_AdminServiceServicer_to_server(admin, server.grpc)
    ReflectionServicer().add_to(server.grpc)
    if peers is not None:
        peers.add_to(server.grpc)
    if feed is not None:
        add_FeedServiceServicer_to_server(FeedServicer(feed), server.grpc)
    # Health of the inference services is asked here, too: a client's own health checks have no model to be routed by.
    inference = (prefix.strip("/") for prefix in (OPENAI_PREFIX, INFERENCE_PREFIX))
    server.serve(FLEET_SERVICE, MODEL_SERVICE, ADMIN_SERVICE, *inference, with_reflection=False)
    return server


if __name__ == "__main__":
    run("proxy", ProxySettings, main, is_hot=True)
