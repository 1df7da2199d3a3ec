"""What is simulated below the policies: nodes, tiers of storage, starts by phase, engines. No decision is made here.

Constants are of three kinds. Measured on this project's machines: what a start takes without its weights (2.5 s; a
fork with a frozen heap gave 2.15 to 2.5 s before later work made it 0.3 s for a small model on a CPU, and nobody has
measured a GPU yet, so the older figure stands), and what the edge adds to a request (1.5 ms). Taken from data sheets:
bandwidths of PCIe 4 (25 GB/s), one NVMe (3 GB/s), 10 GbE at 94 % (1.17 GB/s), an object store by one node (0.5 GB/s),
and a GPU of 80 GiB, 150 TFLOP/s of dense work and 1.5 TB/s of memory that is really had. Sleep is no more than
documented: what a sleeping replica leaves on its device and how often it may wake are the worker's own settings; waking
takes 0.6 s (its KV cache, the canary) beside the weights, which makes 1.2 s for 8 B and 3.2 s for 32 B parameters where
vLLM's authors publish 0.8 to 2.6 s for sleep of level 2, and GKE 2.7 s for 32 B.

Simplified: a tier's bandwidth is each start's own; disks do not fill; nothing is in the page cache but what is staged;
a request's time is fixed when it begins to run, from how many run beside it then; prompts share no prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Final

from helios.proxy.catalogue import ModelEntry

GIB: Final = 1 << 30
# Beside its weights a step takes this long, and each request that runs beside makes it longer by this share.
_STEP_SECONDS: Final = 0.003
_CROWDING: Final = 0.02


class Tier(IntEnum):
    """Where weights come from, the fastest first."""

    MEMORY = 0
    DISK = 1
    PEER = 2
    CLOUD = 3


@dataclass(frozen=True, slots=True)
class Hardware:
    """A node, and what is around it. Each has one GPU.

    Attributes:
        device_bytes: of the GPU.
        host_bytes: host memory in which weights may be staged.
        slot_count: replicas that it may have.
        bytes_per_second: by tier.
        start_seconds: a start without its weights: process, engine, KV cache, warm-up.
        stop_seconds: from the order until the device's memory is free again.
        can_sleep: replicas can sleep: weights and KV cache leave the device, processes wait.
        sleep_seconds: from the order until the device's memory is free, but for what is left.
        wake_seconds: a wake without its weights.
        asleep_bytes: of the device, that a sleeping replica books.
        wake_limit: how often a replica may wake; then it stops instead of sleeping.
        edge_seconds: what gateway and replica add to the time to first token.
        flops: of dense work, per second.
        device_bytes_per_second: of the device's memory.
        running_count: requests that an engine runs at once.
    """

    device_bytes: int = 80 * GIB
    host_bytes: int = 192 * GIB
    slot_count: int = 8
    bytes_per_second: tuple[float, float, float, float] = (25e9, 3e9, 1.17e9, 0.5e9)
    start_seconds: float = 2.5
    stop_seconds: float = 1.0
    can_sleep: bool = True
    sleep_seconds: float = 1.0
    wake_seconds: float = 0.6
    asleep_bytes: int = GIB
    wake_limit: int = 20
    edge_seconds: float = 0.0015
    flops: float = 150e12
    device_bytes_per_second: float = 1.5e12
    running_count: int = 64

    def started_after(self, tier: Tier, weights_bytes: int) -> float:
        """Seconds from the order of a start until the replica is ready: what is fetched is loaded as it comes."""
        return self.start_seconds + weights_bytes / self.bytes_per_second[tier]

    def awake_after(self, tier: Tier, weights_bytes: int) -> float:
        """Seconds from the order of a wake until the replica is ready, once it sleeps."""
        return self.wake_seconds + weights_bytes / self.bytes_per_second[tier]


@dataclass(frozen=True)
class Model:
    """A model: what the proxy is told of it, and how fast it runs."""

    entry: ModelEntry
    hardware: Hardware

    @cached_property
    def prompt_token_seconds(self) -> float:
        """Seconds that a token of a prompt takes: two operations for each parameter."""
        return 2.0 * self.entry.parameter_count / self.hardware.flops

    @cached_property
    def step_seconds(self) -> float:
        """Seconds of a step that makes a token for each request, with one request: weights are read once."""
        return _STEP_SECONDS + self.entry.weights_bytes / self.hardware.device_bytes_per_second

    def times(self, prompt_tokens: int, completion_tokens: int, running_count: int) -> tuple[float, float]:
        """Returns seconds to the first token, and to the end, of a request that begins beside so many others."""
        step = self.step_seconds * (1.0 + _CROWDING * running_count)
        first = prompt_tokens * self.prompt_token_seconds + step
        return first, first + max(0, completion_tokens - 1) * step


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of model: parameters in billions, how many of a hundred models have it, layers, KV bytes of a token."""

    parameters_b: float
    percent: int
    layer_count: int
    kv_bytes_per_token: int


SHAPES: Final = (
    Shape(0.5, 15, 24, 12_288),
    Shape(1.5, 20, 28, 28_672),
    Shape(3.0, 20, 36, 36_864),
    Shape(8.0, 30, 32, 131_072),
    Shape(14.0, 10, 48, 196_608),
    Shape(32.0, 5, 64, 262_144),
)


def models(count: int, hardware: Hardware) -> list[Model]:
    """Returns models of all shapes, spread over popularity: which one is large has nothing to do with its rank."""
    # A step that has no divisor in common with a hundred visits each percent once.
    percents = [(37 * index) % 100 for index in range(100)]
    shapes = [shape for shape in SHAPES for _ in range(shape.percent)]
    return [_model(index, shapes[percents[index % 100]], hardware) for index in range(count)]


def _model(index: int, shape: Shape, hardware: Hardware) -> Model:
    parameter_count = int(shape.parameters_b * 1e9)
    entry = ModelEntry(
        name=f"model-{index:05d}",
        revision=f"sha256:{index:064x}",
        weights_bytes=2 * parameter_count,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        max_context_tokens=8192,
        parameter_count=parameter_count,
        dtype="bfloat16",
        layer_count=shape.layer_count,
        vocabulary_size=128_000,
    )
    return Model(entry, hardware)


def node_name(index: int) -> str:
    """Names sort as their numbers do."""
    return f"node-{index:04d}"


@dataclass(slots=True)
class Stores:
    """Which node has which model's bytes where.

    At first each model lies on two nodes' disks; what a node once loaded stays on its disk.
    """

    hardware: Hardware
    models: Sequence[Model]
    node_count: int
    _disks: dict[int, set[int]] = field(default_factory=dict)
    _staged: dict[tuple[int, int], float] = field(default_factory=dict)

    def tier(self, model: int, node: int, now: float) -> Tier:
        """Where a start on a node finds the weights now."""
        if self._staged.get((model, node), now + 1.0) <= now:
            return Tier.MEMORY
        return self._tier_below(model, node)

    def start(self, model: int, node: int, now: float) -> tuple[Tier, float]:
        """Begins a start; returns where its weights come from and how long it takes."""
        tier = self.tier(model, node, now)
        self._holders(model).add(node)
        return tier, self.hardware.started_after(tier, self.models[model].entry.weights_bytes)

    def wake(self, model: int, node: int, now: float) -> float:
        """Begins a wake; returns how long it takes: weights are read again, from memory where they are staged."""
        return self.hardware.awake_after(self.tier(model, node, now), self.models[model].entry.weights_bytes)

    def stage(self, model: int, node: int, now: float, *, is_loaded: bool) -> None:
        """Begins to bring weights to memory; where a replica has just had them, they are there already."""
        seconds = 0.0
        if not is_loaded:
            tier = self._tier_below(model, node)
            seconds = self.models[model].entry.weights_bytes / self.hardware.bytes_per_second[tier]
            self._holders(model).add(node)
        self._staged.setdefault((model, node), now + seconds)

    def disks(self, model: int) -> frozenset[int]:
        """Nodes that have the bytes on their disk."""
        return frozenset(self._holders(model))

    def unstage(self, model: int, node: int) -> None:
        """Gives memory back."""
        self._staged.pop((model, node), None)

    def _tier_below(self, model: int, node: int) -> Tier:
        holders = self._holders(model)
        if node in holders:
            return Tier.DISK
        return Tier.PEER if holders else Tier.CLOUD

    def _holders(self, model: int) -> set[int]:
        holders = self._disks.get(model)
        if holders is None:
            first = (model * 2_654_435_761) % self.node_count
            holders = self._disks[model] = {first, (first + self.node_count // 2) % self.node_count}
        return holders
