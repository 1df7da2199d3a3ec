"""Settings of the proxy process: defaults < file < `HELIOS_PROXY__<FIELD>` < flags."""

import random
from pathlib import Path
from typing import ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from helios.mesh.addresses import dialable
from helios.mesh.routing import NAMES, Choice, ModelRouting
from helios.mesh.settings import CLOSE_SECONDS, ProcessSettings
from helios.proxy.activation.machine import ActivationPolicy
from helios.proxy.activation.turns import TurnPolicy
from helios.proxy.breaker import BreakerPolicy
from helios.proxy.core import CorePolicy
from helios.proxy.express.lane import ExpressPolicy
from helios.proxy.holds import HoldLimits
from helios.proxy.lifecycle import LifecyclePolicy
from helios.proxy.outliers import OutlierPolicy
from helios.proxy.retries import RetryPolicy
from helios.proxy.routing.rules import Rules
from helios.proxy.routing.table import Locality
from helios.proxy.scaling.forecast import WarmPoolMode
from helios.proxy.scaling.load import LoadPolicy, ScalingMode
from helios.proxy.sizing import SizingPolicy
from helios.proxy.swap import SwapPolicy
from helios.proxy.traffic import RoutingPolicy
from helios.proxy.warmth import WarmthPolicy

_FROZEN = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HoldSettings(BaseModel):
    """Requests that wait for a model to start."""

    model_config = _FROZEN

    limit_seconds: PositiveFloat = 300.0
    """Longest wait, counted from the request's start, in seconds. 300: above the start of a large model from a disk,
    below Envoy's wait for the picker, so that clients get 503 with Retry-After and never a bare 504."""
    model_count: PositiveInt = 512
    """Requests that may wait for one model. 512: a burst that one replica works off within minutes. Where it is full, a
    request of a higher priority, or of a tenant with fewer of these places, puts another one out (503)."""
    tenant_count: PositiveInt = 256
    """Of these, requests of one tenant (of API keys); further ones are refused (429). 256: half."""
    total_count: PositiveInt = 4096
    """Requests that may wait in all. 4,096: a held request costs some 50 KiB here and in Envoy."""
    total_bytes: PositiveInt = 512 << 20
    """Bytes of bodies (by content-length) that may wait in Envoy's memory. 512 MiB: far below Envoy's heap limit."""


class FleetSettings(BaseModel):
    """Workers."""

    model_config = _FROZEN

    report_interval_seconds: PositiveFloat = 1.0
    """How often workers report at least, and this proxy says something at least, in seconds."""
    silence_intervals: PositiveFloat = 3.0
    """A worker that says nothing for this many intervals is un-picked. 3: one lost report is no news."""
    worker_grace_seconds: PositiveFloat = 30.0
    """How long endpoints and replicas of an unreachable worker are kept, in seconds. 30: a supervisor restarts in a few
    seconds, and its replicas serve on meanwhile; a node that is gone for longer is replaced."""
    resync_seconds: NonNegativeFloat = 5.0
    """How long a proxy that starts waits for the workers that it knew before it publishes and starts anything, in
    seconds. 5: workers dial again within 1. 0: no wait."""


class ReplicaSettings(BaseModel):
    """How replicas are sized, started and stopped."""

    model_config = _FROZEN

    engine: str = ""
    """Engine to run models with; empty: each worker's default."""
    overhead_bytes: PositiveInt = 208 << 20
    """Memory of a replica's processes on a CPU, for each rank, beside weights, KV cache and activations, which are
    predicted from the model. 208 MiB: two processes of vLLM, measured. What replicas are then measured to hold
    corrects it, revision by revision."""
    gpu_overhead_bytes: PositiveInt = 1536 << 20
    """The same on a GPU, of its memory. 1.5 GiB: a CUDA context, cuBLAS workspaces, graphs, NCCL's buffers."""
    sleeps: bool = True
    """Whether idle replicas sleep on their GPU (weights off the device, processes wait) before they are stopped."""
    stages: bool = True
    """Whether a model whose last replica is stopped for idleness, or sleeps, stays staged: its weights in the node's
    memory, while there is room. The ones used longest ago give way to others."""
    asleep_seconds: NonNegativeFloat = 1800.0
    """A replica that has slept for so long without a request stops, and its weights stay staged, in seconds; a model's
    own policy may say otherwise. 1,800: processes that wait hold host memory, a CUDA context and one of the worker's
    slots, and four of five that are woken at all within an hour are so by then. 0: never."""
    staged_seconds: NonNegativeFloat = 0.0
    """Weights that have lain in memory for so long after that are given back, in seconds; a model's own policy may say
    otherwise. 0: when the memory is needed."""
    pressure_ratio: PositiveFloat = Field(default=0.9, le=1)
    """Staged weights are given back where more of a node's memory than this is used."""
    context_count: PositiveInt = 4
    """Full contexts that the KV cache should hold."""
    min_kv_cache_bytes: PositiveInt = 256 << 20
    """Lower bound of a replica's KV cache. 256 MiB: below it, batching has no room."""
    max_kv_cache_bytes: PositiveInt = 4 << 30
    """Upper bound of a replica's KV cache, where one full context needs less. 4 GiB."""
    start_seconds: PositiveFloat = 300.0
    """How long a start may get no further (no byte that comes, no phase that ends) before it is given up, in seconds,
    beside what its bytes take at `start_least_bytes_per_second`; one that compiles, `swap.start_seconds`. 300: above
    the worker's own replica.start_seconds, which knows why."""
    start_least_bytes_per_second: PositiveInt = 64 << 20
    """How slowly a replica may load what it books, in bytes per second: no fixed time is right for a model of 100 MB
    and one of 100 GB. 64 MiB: a network disk, as workers have it."""
    wait_seconds: PositiveFloat = 30.0
    """How long requests wait for a worker to connect, in seconds. For memory that others have, they wait in line, as
    long as `hold.limit_seconds` lets them."""
    drain_seconds: PositiveFloat = 30.0
    """How long a draining replica may finish its requests, in seconds."""
    residency_seconds: NonNegativeFloat = 10.0
    """A replica that became ready less than this ago is not preempted for another model, in seconds: anti-thrash."""
    turn_seconds: NonNegativeFloat = 30.0
    """A model that has waited for so long takes room from others that are in use, in seconds. These have had their turn
    when they have served all that waited for their start, for as long as it took and at least residency_seconds; the
    model that has waited longest is next. 30: below the patience of clients, above the pauses of one. 0: what is in
    use never gives way."""
    turn_drain_seconds: PositiveFloat = 300.0
    """How long requests may go on at a replica whose turn is over, in seconds; then they are cut off. 300: as long as
    those wait at most for whom it goes."""
    start_base_seconds: PositiveFloat = 5.0
    """Guess for a model's first start without its weights, in seconds; measured starts replace it."""
    start_bytes_per_second: PositiveInt = 1 << 30
    """Guess of how fast weights come, in bytes per second; measured starts replace it."""


class SwapSettings(BaseModel):
    """Models that start eager and then get compiled replicas (`compilation=eager_then_compiled`)."""

    model_config = _FROZEN

    after_seconds: NonNegativeFloat = 30.0
    """How long a model must have been used since its eager replica got ready, in seconds. 30: a few questions in a row
    are no reason to compile for two minutes. Less where the last compiled start took less, because its code was on the
    node. A model with min_replicas need not be used."""
    recent_seconds: PositiveFloat = 60.0
    """How long ago its last use may be then, in seconds. 60: people read between two questions."""
    attempt_count: PositiveInt = 3
    """Compiled replicas of a revision and its settings that may fail; then it stays eager until the model changes."""
    back_off_seconds: PositiveFloat = 60.0
    """Pause after the first failure, in seconds; four times as long after each further one."""
    start_seconds: PositiveFloat = 2400.0
    """How long a compiled start may take before it is given up, in seconds, beside what its bytes take at
    `replica.start_least_bytes_per_second`. Above the worker's own replica.background_start_seconds, which knows why."""
    overlap_seconds: NonNegativeFloat = 2.0
    """How long both replicas are picked before the eager one drains, in seconds: a request that it then refuses names
    the other one, too, and Envoy goes on there."""
    drain_seconds: PositiveFloat = 600.0
    """How long requests at the eager replica may go on when a compiled one has taken over, in seconds. 600: above the
    longest answers; an idle one is gone at once. A start that needs room takes it from idle models first."""
    nearly_done_ratio: PositiveFloat = Field(default=0.8, le=1)
    """Where nobody uses the model any more, a compile is stopped, unless this share of its usual time is over."""
    proven_seconds: PositiveFloat = 600.0
    """A compiled replica that fails later than this after it got ready does not speak against compiling, in seconds."""


class ScalingSettings(BaseModel):
    """Models whose load asks for more replicas than one; a model's max_replicas bounds them."""

    model_config = _FROZEN

    mode: ScalingMode = ScalingMode.ON
    """`on`: replicas are added where there is room that nobody has (on processors, on other nodes), and go when they
    are no longer needed. `advise`: decisions are logged, and nothing is done. `off`: one replica a model, or
    min_replicas."""
    target_ratio: float = Field(default=0.7, gt=0, le=1)
    """Share of the requests that an engine runs at once which a replica should have. 0.7: the next ones find room
    while another replica starts."""
    kv_ratio: float = Field(default=0.9, gt=0, le=1)
    """One more replica is asked for where KV caches are fuller than this and requests wait for them."""
    kv_target_ratio: float = Field(default=0.8, ge=0, le=1)
    """How full KV caches should be, on the mean of stable_seconds: few requests with long prompts fill them before
    their number tells. 0.8: beyond it, engines soon preempt requests. 0: whatever they are."""
    batch_target_ratio: float = Field(default=0.0, ge=0, le=1)
    """How full batches should be, of the requests that an engine runs at once. 0: whatever they are, since target_ratio
    counts these requests, and those that wait, too."""
    device_target_ratio: float = Field(default=0.0, ge=0, le=1)
    """How busy devices should be. 0: whatever they are, since a device that decodes one request is as busy as one that
    decodes fifty."""
    stable_seconds: PositiveFloat = 60.0
    """The mean number of requests over this time counts, in seconds."""
    panic_seconds: PositiveFloat = 6.0
    """The mean over this time counts where it asks for `panic_ratio` times the replicas, in seconds."""
    panic_ratio: float = Field(default=2.0, gt=1)
    """When the short mean counts."""
    keep_seconds: NonNegativeFloat = 300.0
    """As many replicas stay as were asked for at any time in so long, in seconds. 300: a pause between two bursts."""
    drain_seconds: NonNegativeFloat = 3600.0
    """How long requests may go on at a replica that load needs no more, or whose revision is served no more, in
    seconds; then they are cut off. 3,600: it was not drained for its room, so that no answer has to end
    for it; a start that needs room takes it from idle models first, and where there are none,
    `replica.turn_drain_seconds` are left."""


class RoutingSettings(BaseModel):
    """Which of several replicas takes a request. A model's own policy goes before (`helios models policy --route`)."""

    model_config = _FROZEN

    queue_weight: float = Field(default=0.5, ge=0, le=1)
    """What it weighs in a replica's load that few requests wait in its engine, beside running_weight and kv_weight,
    where only their ratio counts. 0.5, the most: waiting costs whole requests of time."""
    running_weight: float = Field(default=0.3, ge=0, le=1)
    """What it weighs there that few requests run, or are on their way. 0.3: each slows the others a little."""
    kv_weight: float = Field(default=0.2, ge=0, le=1)
    """What it weighs there that the KV cache is empty. 0.2: it warns of preemption."""
    prefix_weight: float = Field(default=0.4, ge=0, lt=1)
    """The share of a replica's score that a prompt is which it has wholly in its cache; its load has the rest. 0.4: the
    next turn of a conversation goes where the last one was until requests queue there. 0: prompts are not looked
    at, which saves one exchange with Envoy a request."""
    queue_count: NonNegativeInt = 32
    """Requests that may wait inside a replica's engine, in the order in which they came; others wait here meanwhile,
    where priorities and shares of tenants count. 32: what an engine works off before the next report. 0: any
    number."""
    session_weight: float = Field(default=0.2, ge=0, lt=0.5)
    """The share of a replica's score that a request's session has (`x-session-id`; in OpenAI's bodies
    `prompt_cache_key`, `safety_identifier`, `user`) where it is at home there. 0.2: it stays until its replica has some
    two requests more than another one. 0: sessions are not told apart."""
    choice: Choice = Choice.BEST
    """`best`: the best of all candidates. `power_of_two`: the better one of two that are drawn, and those that a prompt
    or a session draws the request to; for many proxies, which would all send to the one that looks best."""
    node: str = ""
    """Name of the gateway's node, as workers call theirs; replicas there are nearer. Empty: not known."""
    zone: str = ""
    """Zone of the gateway, as workers call theirs. Empty: not known."""
    kept_for_high_ratio: float = Field(default=0.0, ge=0, lt=1)
    """The share of a replica's places (of the requests that it works on at once) that is kept for requests of high
    priority: others are not sent there while no more than these are free, and wait. 0: no place is kept; the highest
    priority goes first where requests wait."""
    kept_from_low_ratio: float = Field(default=0.0, ge=0, lt=1)
    """The share, beside it, that is kept for requests of normal and high priority. One place stays for everybody."""
    locality_weight: float = Field(default=0.2, ge=0, lt=0.5)
    """The share of a replica's score that nearness is, where the gateway's node or zone is known: all of it on the same
    node, half in the same zone. 0.2: another zone is asked once two requests more run here."""
    express_models: int = Field(default=16, ge=0, le=32)
    """Models that Envoy may route by itself, without asking this proxy about each request: those with one to 32
    replicas that are asked for most, where no key, rollout or adapter has a say. 16: Envoy compares each request with
    the name of each, a tenth of a microsecond. At most 32: of so many it remembers prompts. 0: all requests are picked
    here."""
    express_per_second: PositiveFloat = 1.0
    """Requests a second of a model above which Envoy routes it by itself. 1: each such change is a message to every
    Envoy."""
    prefix_blocks: PositiveInt = 500_000
    """Blocks of 256 bytes of prompts that are remembered, of all replicas. 500,000: 100 to 200 MiB of this process
    once they are full; a thousand replicas have 500 each then, which is 32,000 tokens."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if problem := self._said().problem():
            raise ValueError(problem)
        return self

    def rules(self) -> Rules:
        """How replicas of a model are chosen among whose policy says nothing else."""
        return Rules().of_model(self._said(), 0, knows_place=True)

    def _said(self) -> ModelRouting:
        return ModelRouting(**{name: getattr(self, name) for name in NAMES})


class BreakerSettings(BaseModel):
    """When a replica is left alone."""

    model_config = _FROZEN

    failure_count: PositiveInt = 3
    """Failures in a row that take a replica out. 3: one is chance, two happen in one restart."""
    open_seconds: PositiveFloat = 2.0
    """How long it is out the first time, in seconds; doubles up to max_open_seconds."""
    max_open_seconds: PositiveFloat = 30.0
    """Bound of the doubling, in seconds."""
    probe_seconds: PositiveFloat = 30.0
    """How long the one request that tries a replica again may take before another may try, in seconds."""
    outlier_ratio: float = Field(default=0.3, ge=0, le=1)
    """A replica of whose last some twenty requests this share failed is taken out, too, where its neighbours fail at
    most a third as often. 0: never."""
    retry_ratio: float = Field(default=0.2, ge=0, le=1)
    """Retries on another replica for each request of a model, in the long run; further ones fail at once. 0.2: where
    more fail, more load does not help."""
    retry_burst: NonNegativeInt = 10
    """Retries that a model may have beside, before it has earned them."""


class AdmissionSettings(BaseModel):
    """Who may ask."""

    model_config = _FROZEN

    require_keys: bool = False
    """Whether requests without an API key are refused (401). `helios up` sets it where the public address is not a
    loopback one."""
    free_priority: bool = False
    """Whether requests without an API key may ask for a high priority (`service_tier`: `priority`). False: normal is
    the most they get; one with a key gets what its key has at most."""


class ExplainSettings(BaseModel):
    """What is remembered of requests, for `helios why`."""

    model_config = _FROZEN

    request_count: PositiveInt = 4096
    """Requests that can be explained, the newest. 4,096: minutes under load, days of trying things out."""
    total_bytes: PositiveInt = 16 << 20
    """Bytes that they may take, by their own account. 16 MiB: 4,096 requests of which many were held."""


class UsageSettings(BaseModel):
    """Telling the registry how much models are used, and taking its advice."""

    model_config = _FROZEN

    report_interval_seconds: PositiveFloat = 30.0
    """How often the registry is told, in seconds. 30: what a crash costs at most, and one small call twice a minute."""
    warm_pool: WarmPoolMode = WarmPoolMode.ADVISE
    """What is made of the registry's advice on how warm models are kept. ``advise``: it is logged, listed among the
    scaling decisions, and shown. ``on``: replicas that are to be ready are started where there is room and do not go
    for idleness, weights that are to be in memory are staged where memory is free, and other models go as soon as they
    are no longer worth waiting for. ``off``: nothing."""


class PeerSettings(BaseModel):
    """Several proxies."""

    model_config = _FROZEN

    lease: bool = False
    """Whether there are several: then one of them leads, by a lease of the registry, and the others follow it. False:
    this one decides alone, as two that don't know of each other must not. `helios up --proxies N` sets it."""
    ttl_seconds: float = Field(default=6.0, ge=1, le=300)
    """How long a lead lasts without being renewed, in seconds: so long does nothing new start when the leader dies. 6:
    above what a busy registry takes for three renewals."""
    address: str = ""
    """`host:port` at which other proxies reach `control_listen`. Empty: where that is, which must be no wildcard."""


class ProxySettings(ProcessSettings):
    """Settings of `python -m helios.proxy`."""

    process_name: ClassVar[str] = "proxy"

    state_directory: Path = Path("helios-proxy")
    """Where the copy of the catalogue and the list of workers are kept."""
    picker_listen: str = "127.0.0.1:0"
    """`ip:port` or `unix:/path` of the endpoint picker (ext_authz, ext_proc) and the ADS server, for Envoy."""
    control_listen: str = "127.0.0.1:0"
    """`ip:port` or `unix:/path` of the control services: fleet, models, admin, health, reflection."""
    registry_target: str = ""
    """`ip:port` or `unix:/path` of the registry. Empty: none; only the catalogue on disk is known."""
    proxy_id: str = "proxy"
    """Names this proxy to workers, and among several proxies, of which each has a name of its own: two with one would
    take the lead from each other for ever."""
    replica_cluster: str = ""
    """Envoy's cluster that this proxy's endpoints are in, where Envoy has one for each of several proxies. Empty: there
    is but one, fed by whichever proxy Envoy is connected to."""
    idle_timeout_seconds: NonNegativeFloat = 900.0
    """A model without requests for this long goes to zero (or to its min_replicas), in seconds. 900: above the pauses
    of a conversation. 0: never."""
    reservation_seconds: PositiveFloat = 15.0
    """How long a pick counts as load before its replica reports the request, in seconds. 15: a large body that is
    still on its way."""
    drain_seconds: NonNegativeInt = 5
    """How long calls may go on when the process stops, in seconds. Held requests move to another proxy, or get a
    503."""
    pickers: int = Field(default=1, ge=1, le=8)
    """Processes that pick for each proxy that `helios up` starts, itself included, each an endpoint of its own at
    Envoy: one picks some 2,000 requests a second. Workers have one session with all of them."""
    feed_target: str = ""
    """`ip:port` or `unix:/path` of the control services of a proxy of this host: this process only picks and holds, and
    hears from that one what workers say. Empty: workers dial this one."""
    hold: HoldSettings = Field(default_factory=HoldSettings)
    """Holds."""
    fleet: FleetSettings = Field(default_factory=FleetSettings)
    """Workers."""
    replica: ReplicaSettings = Field(default_factory=ReplicaSettings)
    """Replicas."""
    swap: SwapSettings = Field(default_factory=SwapSettings)
    """Models that start eager and then get compiled replicas."""

    scaling: ScalingSettings = Field(default_factory=ScalingSettings)
    """How many replicas."""
    routing: RoutingSettings = Field(default_factory=RoutingSettings)
    """Which replica."""
    breaker: BreakerSettings = Field(default_factory=BreakerSettings)
    """Circuit breaker."""

    admission: AdmissionSettings = Field(default_factory=AdmissionSettings)
    """API keys."""

    peers: PeerSettings = Field(default_factory=PeerSettings)
    """Several proxies."""

    explain: ExplainSettings = Field(default_factory=ExplainSettings)
    """Explanations of requests."""

    usage: UsageSettings = Field(default_factory=UsageSettings)
    """Usage of models, and advice on it."""

    @property
    def has_peers(self) -> bool:
        """Whether this proxy is one of several, or a picker of another one: each then knows and tells Envoy its own."""
        return self.peers.lease or bool(self.replica_cluster or self.feed_target)

    @property
    def stop_limit_seconds(self) -> float:
        """How long the whole stop may take: two servers drain, one after the other."""
        return max(self.stop_seconds, 2 * self.drain_seconds + CLOSE_SECONDS)

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        is_shown = self.control_listen.startswith("unix:") or dialable([self.control_listen])
        if self.peers.lease and not self.peers.address and not is_shown:
            raise ValueError(f"peers.address: other proxies can't reach this one at {self.control_listen}; say where")
        return self

    def core_policy(self) -> CorePolicy:
        """The core's share of the settings."""
        hold, fleet = self.hold, self.fleet
        return CorePolicy(
            holds=HoldLimits(hold.model_count, hold.tenant_count, hold.total_count, hold.total_bytes),
            breaker=BreakerPolicy(**self.breaker.model_dump(exclude={"outlier_ratio", "retry_ratio", "retry_burst"})),
            lifecycle=self._lifecycle_policy(),
            reservation_seconds=self.reservation_seconds,
            silence_seconds=fleet.report_interval_seconds * fleet.silence_intervals,
            worker_grace_seconds=fleet.worker_grace_seconds,
            resync_seconds=fleet.resync_seconds,
            routing=RoutingPolicy(
                self.routing.rules(),
                self.routing.prefix_blocks,
                self.routing.queue_count,
                RetryPolicy(self.breaker.retry_ratio, self.breaker.retry_burst),
                OutlierPolicy(self.breaker.outlier_ratio),
                Locality(self.routing.node, self.routing.zone),
                # It spreads requests and hides nothing.
                random.Random().randrange,  # noqa: S311
                ExpressPolicy(0 if self.has_peers else self.routing.express_models, self.routing.express_per_second),
            ),
            requires_keys=self.admission.require_keys,
            has_free_bands=self.admission.free_priority,
        )

    def _lifecycle_policy(self) -> LifecyclePolicy:
        replica = self.replica
        return LifecyclePolicy(
            activation=ActivationPolicy(
                wait_seconds=replica.wait_seconds,
                start_seconds=replica.start_seconds,
                least_bytes_per_second=replica.start_least_bytes_per_second,
            ),
            sizing=SizingPolicy(
                overhead_bytes=replica.overhead_bytes,
                gpu_overhead_bytes=replica.gpu_overhead_bytes,
                context_count=replica.context_count,
                min_kv_cache_bytes=replica.min_kv_cache_bytes,
                max_kv_cache_bytes=replica.max_kv_cache_bytes,
            ),
            engine=replica.engine,
            idle_seconds=self.idle_timeout_seconds,
            residency_seconds=replica.residency_seconds,
            turns=TurnPolicy(replica.turn_seconds, replica.turn_drain_seconds),
            drain_seconds=replica.drain_seconds,
            start_base_seconds=replica.start_base_seconds,
            start_bytes_per_second=float(replica.start_bytes_per_second),
            warmth=WarmthPolicy(
                sleeps=replica.sleeps,
                stages=replica.stages,
                pressure_ratio=replica.pressure_ratio,
                asleep_seconds=replica.asleep_seconds,
                staged_seconds=replica.staged_seconds,
            ),
            warm_pool=self.usage.warm_pool,
            load=LoadPolicy(**self.scaling.model_dump()),
            swap=SwapPolicy(**self.swap.model_dump(), least_bytes_per_second=replica.start_least_bytes_per_second),
        )
