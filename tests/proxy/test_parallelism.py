"""How a model is split that leaves it open: the smallest gang of one node, stages within islands, wherever one fits."""

import json
from dataclasses import replace
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.gangs import GangDevice, Way, choose_devices
from helios.proxy import actions
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.engine_needs import needs_of, with_split
from helios.proxy.fleet.commands import DrainReplica, StartReplica
from helios.proxy.fleet.state import Device, DeviceKind, ReplicaState, WorkerHello
from helios.proxy.placement.parallelism import WHOLE, Split, choose_groups, islands_of, splits_of
from helios.proxy.placement.place import Placed, place
from helios.proxy.placement.workers import WorkerCapacity
from tests.proxy.support import GIB, core, entry, ready, replica

OPEN = '{"tensor_parallel_size": 0}'


def node(*islands: tuple[int, ...], kind: str = "CUDA", has_nvlink: bool = True) -> list[GangDevice]:
    """Devices with so much free memory, in islands of NVLink."""
    ids = [[f"{kind}{number}.{n}" for n in range(len(island))] for number, island in enumerate(islands)]
    everyone = [one for island in ids for one in island]

    def ways(own: str, near: list[str]) -> dict[str, Way]:
        joined = Way.NVLINK if has_nvlink else Way.PCIE_HOST
        return {other: joined if other in near else Way.SYSTEM for other in everyone if other != own}

    return [
        GangDevice(own, kind, free, ways=ways(own, near))
        for near, island in zip(ids, islands, strict=True)
        for own, free in zip(near, island, strict=True)
    ]


def test_the_smallest_gang_comes_first_and_of_one_size_the_one_with_fewer_stages() -> None:
    found = splits_of((1, 2, 4), (1, 2, 4, 8))
    assert found[:6] == (WHOLE, Split(2), Split(1, 2), Split(4), Split(2, 2), Split(1, 4))
    assert all(split.rank_count <= 16 for split in found)
    assert splits_of((), (1, 2)) == (WHOLE, Split(1, 2))
    assert splits_of((1, 3, 9), ()) == (WHOLE, Split(3), Split(9))


def test_ranks_of_a_layer_stay_within_an_island_and_stages_need_not() -> None:
    devices = node((10, 10, 10, 10), (10, 10, 10, 10))
    assert choose_groups(devices, 10, Split(8)) is None
    gang = choose_groups(devices, 10, Split(4, 2))
    assert gang is not None
    assert [key.split(".")[0] for key in gang.device_ids] == ["CUDA0"] * 4 + ["CUDA1"] * 4
    # In one island where that has room, and in the smaller one.
    pair = choose_groups(node((10, 10, 10, 10), (10, 10)), 10, Split(2))
    assert pair is not None
    assert set(pair.device_ids) == {"CUDA1.0", "CUDA1.1"}
    assert pair.slowest is Way.NVLINK


def test_without_nvlink_all_devices_of_a_kind_are_one_island_and_slices_are_none() -> None:
    gang = choose_groups(node((10, 10), (10, 10), has_nvlink=False), 10, Split(4))
    assert gang is not None
    assert len(set(gang.device_ids)) == 4
    slices = [replace(device, is_slice=True) for device in node((10, 10))]
    assert choose_groups(slices, 5, Split(2)) is None
    assert choose_groups(slices, 5, WHOLE) is not None
    mixed = [*node((10,), kind="A"), *node((10,), kind="B")]
    assert choose_groups(mixed, 5, Split(2)) is None, "a gang is of one kind"


def test_ranks_of_a_layer_are_the_devices_that_are_nearest_each_other() -> None:
    devices = node((9, 10), (9, 10), has_nvlink=False)
    gang = choose_groups(devices, 5, Split(2))
    assert gang is not None
    assert gang.slowest is Way.PCIE_HOST, "those with the least to spare are on two sockets"
    assert gang == choose_devices(devices, 5, 2)


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@st.composite
def nodes(draw: st.DrawFn) -> list[GangDevice]:
    devices = node(*map(tuple, draw(st.lists(SIZES, min_size=1, max_size=3))), has_nvlink=draw(st.booleans()))
    slices = draw(st.sets(st.sampled_from(range(len(devices)))))
    kinds = draw(st.sampled_from([1, 2]))
    return [replace(device, is_slice=index in slices, kind=f"K{index % kinds}") for index, device in enumerate(devices)]


SPLITS = st.builds(Split, st.integers(1, 4), st.integers(1, 3))


def can_be(devices: list[GangDevice], share_bytes: int, split: Split) -> bool:
    """Whether there is such a gang, by looking at every set of devices."""
    for chosen in combinations([d for d in devices if d.free_bytes >= share_bytes], split.rank_count):
        if split.rank_count == 1:
            return True
        if len({device.kind for device in chosen}) > 1 or any(device.is_slice for device in chosen):
            continue
        alike = [device for device in devices if device.kind == chosen[0].kind and not device.is_slice]
        stages = sum(len([one for one in chosen if one in island]) // split.tensor for island in islands_of(alike))
        if stages >= split.pipeline:
            return True
    return False


@given(nodes(), st.integers(0, 9), SPLITS)
def test_a_gang_is_found_wherever_there_is_one_and_never_takes_more_than_there_is(
    devices: list[GangDevice], share_bytes: int, split: Split
) -> None:
    gang = choose_groups(devices, share_bytes, split)
    assert (gang is not None) == can_be(devices, share_bytes, split)
    if gang is None:
        return
    chosen = {device.device_id: device for device in devices if device.device_id in gang.device_ids}
    assert len(gang.device_ids) == len(chosen) == split.rank_count, "whole, on devices of its own"
    assert all(device.free_bytes >= share_bytes for device in chosen.values())
    assert gang.left_bytes == sum(device.free_bytes for device in chosen.values()) - share_bytes * split.rank_count
    if split.tensor > 1:
        alike = [d for d in devices if d.kind == chosen[gang.device_ids[0]].kind and not d.is_slice]
        for stage in range(split.pipeline):
            ranks = gang.device_ids[stage * split.tensor : (stage + 1) * split.tensor]
            assert any({d.device_id for d in island} >= set(ranks) for island in islands_of(alike))


def offer(devices: list[GangDevice], split: Split, share_bytes: int) -> WorkerCapacity:
    """A node with room of so much for each rank."""
    count = split.rank_count
    needed_bytes = share_bytes * count
    return WorkerCapacity(
        "w", ("vllm",), needed_bytes, tuple(devices), 1000, 8, device_count=count, split=split, has_gpus=True
    )


@given(nodes(), st.integers(1, 40))
def test_no_smaller_gang_would_have_fitted(devices: list[GangDevice], needed_bytes: int) -> None:
    splits = splits_of((1, 2, 3, 4), (1, 2, 4))

    def share(split: Split) -> int:
        # Each rank has something of its own.
        return -(-needed_bytes // split.rank_count) + 1

    plan = place("", [offer(devices, split, share(split)) for split in splits], may_preempt=False)
    fitting = [split for split in splits if can_be(devices, share(split), split)]
    assert (plan.split if isinstance(plan, Placed) else None) == (fitting[0] if fitting else None)


def test_of_gangs_of_one_size_the_one_with_fewer_stages_is_taken() -> None:
    devices = node((9, 9, 10), (9, 9, 10), has_nvlink=False)
    ways = [offer(devices, split, 5) for split in (Split(2, 2), Split(4))]
    plan = place("", ways, may_preempt=False)
    assert isinstance(plan, Placed)
    assert plan.split == Split(4)


# Through the core.
def large(gib: int, *, options: tuple[int, ...] = (1, 2, 4, 8), settings: str = OPEN) -> ModelEntry:
    return replace(
        entry(engine_settings=settings),
        weights_bytes=gib * GIB,
        tensor_parallel_options=options,
        pipeline_parallel_options=(1, 2, 4),
    )


def fleet(model: ModelEntry, *sizes: int, others: tuple[ModelEntry, ...] = ()) -> Core:
    """A worker whose devices have so many GiB, all joined by NVLink."""
    subject = core()
    subject.models_replaced([model, *others], 0.0, is_synced=True)
    names = [f"cuda:{number}" for number in range(len(sizes))]
    devices = tuple(
        Device(
            name,
            DeviceKind.CUDA,
            size * GIB,
            0,
            ways=tuple((other, Way.NVLINK) for other in names if other != name),
        )
        for name, size in zip(names, sizes, strict=True)
    )
    subject.worker_hello(WorkerHello("w", "1", "node", devices, ("vllm",), 8, ()), 0.0)
    return subject


def asked(subject: Core, model: ModelEntry, now: float = 1.0) -> list[actions.Action]:
    return subject.hold(model, f"q{now}", size_bytes=0, deadline=now + 100, now=now)[1]


def order_of(todo: list[actions.Action]) -> StartReplica:
    (order,) = [action.command.order for action in todo if isinstance(action, actions.Send)]
    assert isinstance(order, StartReplica)
    return order


def split_in(order: StartReplica) -> tuple[int, int]:
    values = json.loads(order.engine_settings)
    return values["tensor_parallel_size"], values["pipeline_parallel_size"]


def test_a_model_takes_as_many_devices_as_it_needs_and_is_told_how() -> None:
    for gib, split in ((4, (1, 1)), (14, (2, 1)), (30, (4, 1))):
        model = large(gib)
        order = order_of(asked(fleet(model, 10, 10, 10, 10), model))
        assert split_in(order) == split
        assert len(order.device_ids) == order.device_count == split[0] * split[1]
        assert needs_of(order.engine_settings).rank_count == order.device_count


def test_what_its_layers_can_t_be_split_into_is_cut_into_stages() -> None:
    model = large(14, options=(1, 3))
    assert split_in(order_of(asked(fleet(model, 10, 10), model))) == (1, 2)
    unknown = replace(large(14, options=()), pipeline_parallel_options=())
    (failed,) = [each for each in asked(fleet(unknown, 10, 10), unknown) if isinstance(each, actions.Fail)]
    assert failed.error.reason == "NO_CAPACITY", "what nobody knows how to split is not split"
    staged = large(14, settings='{"tensor_parallel_size": 0, "pipeline_parallel_size": 2}')
    assert split_in(order_of(asked(fleet(staged, 10, 10, 10, 10), staged))) == (1, 2)


def test_settings_that_say_how_are_left_alone_and_a_cpu_splits_nothing() -> None:
    fixed = large(4, settings='{"tensor_parallel_size": 2}')
    order = order_of(asked(fleet(fixed, 10, 10), fixed))
    assert (order.engine_settings, order.device_count) == (fixed.engine_settings, 2)
    assert with_split(fixed.engine_settings, 4, 1) == fixed.engine_settings
    model = large(4)
    subject = core()
    subject.models_replaced([model], 0.0, is_synced=True)
    cpu = Device("cpu:0", DeviceKind.CPU, 10 * GIB, 0)
    subject.worker_hello(WorkerHello("w", "1", "node", (cpu,), ("vllm",), 8, ()), 0.0)
    assert split_in(order_of(asked(subject, model))) == (1, 1)


def test_what_no_node_has_room_for_is_refused_with_the_reason() -> None:
    model = large(100)
    subject = fleet(model, 10, 10)
    (failed,) = [action for action in asked(subject, model) if isinstance(action, actions.Fail)]
    assert failed.error.reason == "NO_CAPACITY"
    assert "on 2 devices of a node" in failed.error.message


def test_room_is_made_for_a_gang_and_it_gets_that_room() -> None:
    model, other = large(14), replace(entry("other"), revision="sha256:other", weights_bytes=6 * GIB)
    subject = fleet(model, 10, 10, others=(other,))
    held = replace(replica("r", model="other", revision="sha256:other"), memory_bytes=7 * GIB, device_ids=("cuda:1",))
    subject.replica_event("w", 1, held, 0.5)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.5)
    todo = asked(subject, model, 20.0)
    (drained,) = [action.command.order for action in todo if isinstance(action, actions.Send)]
    assert isinstance(drained, DrainReplica)
    order = order_of(subject.replica_event("w", 2, replace(held, state=ReplicaState.STOPPED), 21.0))
    assert split_in(order) == (2, 1)
    assert set(order.device_ids) == {"cuda:0", "cuda:1"}


def test_what_a_split_replica_was_measured_to_hold_is_what_the_next_one_books() -> None:
    model = large(14)
    subject = fleet(model, 12, 12)
    order = order_of(asked(subject, model))
    believed = subject.fleet.replica(order.replica_id)
    assert believed is not None
    subject.replica_event("w", 1, replace(ready(believed), measured_bytes=order.memory_bytes + 2 * GIB), 2.0)
    worker = subject.fleet.worker("w")
    assert worker is not None
    sizes = {c.split: c.needed_bytes for c in subject.lifecycle.room.capacities(worker, model, 3.0)}
    assert sizes[Split(2)] > order.memory_bytes + 2 * GIB
    assert sizes[WHOLE] < order.memory_bytes + GIB, "what was measured of two ranks says nothing of one"
