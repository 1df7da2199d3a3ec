"""Where replicas go: the rules one by one, then against every possibility, then against an exact solver."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ortools.sat.python import cp_model

from helios.mesh.gangs import Gang, GangDevice, Way, choose_devices
from helios.proxy.fleet.state import Device, DeviceKind, WorkerHello
from helios.proxy.placement.defragment import Proposal, propose
from helios.proxy.placement.packing import Want, pack
from helios.proxy.placement.place import Impossible, Placed, Plan, Preempt, Wait, place
from helios.proxy.placement.workers import Occupant, WorkerCapacity
from tests.proxy.support import GIB, MIB, core, entry, hello, ready, replica


def worker(
    worker_id: str = "w",
    *,
    free: Sequence[int] = (10,),
    size: int = 10,
    needs: int = 5,
    count: int = 1,
    **fields: object,
) -> WorkerCapacity:
    """A worker of devices that have `size` bytes each, of which these are free."""
    devices = tuple(GangDevice(f"d{n}", "CUDA", each) for n, each in enumerate(free))
    values: dict[str, object] = {
        "engines": ("vllm",),
        "needed_bytes": needs,
        "device_count": count,
        "devices": devices,
        "memory_bytes": size * count if count <= len(free) else 0,
        "free_slot_count": 8,
    }
    return WorkerCapacity(worker_id, **(values | fields))  # type: ignore[arg-type]


def decide(*workers: WorkerCapacity, engine: str = "vllm", may_preempt: bool = True) -> Plan:
    return place(engine, list(workers), may_preempt=may_preempt)


def where(plan: Plan) -> str:
    assert isinstance(plan, Placed), plan
    return plan.worker_id


# Which of several.
def test_on_processors_the_worker_with_the_most_free_memory_is_chosen() -> None:
    others = worker("a", free=[5]), worker("c", free=[9], engines=("other",))
    assert where(decide(*others, worker("b", free=[7]))) == "b"


def test_on_gpus_the_least_room_is_left_over() -> None:
    assert where(decide(worker("a", free=[9], has_gpus=True), worker("b", free=[6, 10], has_gpus=True))) == "b"
    plan = decide(worker("a", free=[9, 6, 10], has_gpus=True))
    assert isinstance(plan, Placed)
    assert plan.device_ids == ("d1",)


def test_gpus_come_before_processors_and_replicas_of_a_model_apart_before_the_weights() -> None:
    assert where(decide(worker("cpu", free=[90]), worker("gpu", free=[6], has_gpus=True))) == "gpu"
    staged = worker("a", is_staged=True, same_model_count=1)
    assert where(decide(staged, worker("b"))) == "b"


def test_replicas_of_a_model_are_spread_over_zones_then_over_nodes_before_anything_draws_them_together() -> None:
    near = worker("a", same_zone_count=1, is_staged=True), worker("b", same_zone_count=1, same_model_count=1)
    assert where(decide(*near, worker("far", free=[5]))) == "far"
    assert where(decide(worker("far", free=[1], size=1), *near)) == "a"


def test_promised_replicas_come_up_in_different_zones() -> None:
    subject = core()
    subject.models_replaced([entry(min_replicas=3)], 0.0, is_synced=True)
    # The first zone has the most room, and two nodes.
    for number, (worker_id, zone) in enumerate((("a", "one"), ("b", "one"), ("c", "two"))):
        subject.worker_hello(replace(hello(worker_id, memory_bytes=(9 - number) * GIB), zone=zone), 0.0)
    places = []
    for now in range(1, 4):
        subject.tick(float(now))
        (asked,) = (one for one in subject.fleet.replicas() if one.state.is_starting)
        places.append(asked.worker_id)
        subject.replica_event(asked.worker_id, now, ready(asked, f"127.0.0.1:{now}"), float(now))
    assert places == ["a", "c", "b"]


def test_weights_in_memory_come_before_those_on_disk_and_these_before_room() -> None:
    disk, nothing = worker("disk", free=[6], is_on_disk=True), worker("nothing", free=[9])
    assert where(decide(nothing, disk)) == "disk"
    assert where(decide(nothing, disk, worker("staged", free=[5], is_staged=True))) == "staged"


def test_a_gang_goes_where_its_devices_reach_each_other_fastest() -> None:
    def pair(way: Way) -> tuple[GangDevice, ...]:
        return GangDevice("d0", "CUDA", 9, ways={"d1": way}), GangDevice("d1", "CUDA", 9, ways={"d0": way})

    slow = worker("a", count=2, needs=10, devices=pair(Way.SYSTEM), memory_bytes=20, has_gpus=True)
    fast = replace(slow, worker_id="b", devices=pair(Way.NVLINK))
    assert where(decide(slow, fast)) == "b"


def test_what_a_replica_books_differs_by_worker() -> None:
    gpu, cpu = worker("gpu", needs=9, free=[8], has_gpus=True), worker("cpu", needs=3, free=[4])
    assert where(decide(gpu, cpu)) == "cpu"
    assert isinstance(decide(gpu, may_preempt=False), Impossible)


# No room.
def test_no_worker_is_waited_for() -> None:
    assert isinstance(decide(), Wait)
    assert isinstance(decide(worker(engines=())), Wait)


def test_what_fits_nowhere_is_impossible() -> None:
    assert isinstance(decide(worker(needs=11)), Impossible)
    full = worker(free=[0], victims=(Occupant("r", 10, ("d0",), 1.0),))
    assert isinstance(decide(full, may_preempt=False), Impossible)
    assert isinstance(decide(worker(needs=12, count=2, free=[9])), Impossible), "it has one device"
    assert isinstance(decide(worker(needed_host_bytes=2, free_host_bytes=1)), Impossible)


def test_draining_replicas_are_waited_for_before_anything_is_preempted() -> None:
    resident = Occupant("r", 5, ("d0",), 1.0)
    assert isinstance(decide(worker(free=[0], draining=(resident,), victims=(resident,))), Wait)
    late = worker(free=[0], late=(resident,), victims=(replace(resident, replica_id="v"),))
    assert decide(late) == Preempt("w", ("v",))
    assert isinstance(decide(replace(late, victims=())), Wait)
    both = replace(late, needed_bytes=10)
    assert isinstance(decide(both), Wait), "once the late one is gone, the idle one gives way"
    assert isinstance(decide(both, may_preempt=False), Impossible)


def test_what_is_worth_least_gives_way_and_no_more_than_needed() -> None:
    victims = [Occupant(name, 4, ("d0",), value) for name, value in (("dear", 9.0), ("cheap", 1.0), ("middle", 5.0))]
    full = worker(free=[0], victims=tuple(victims))
    assert decide(replace(full, needed_bytes=4)) == Preempt("w", ("cheap",))
    assert decide(replace(full, needed_bytes=8)) == Preempt("w", ("cheap", "middle"))
    large = replace(full, victims=(*victims, Occupant("large", 8, ("d0",), 5.5)))
    assert decide(replace(large, needed_bytes=8)) == Preempt("w", ("large",)), "5.5 is less than 1 and 5"


def test_replicas_give_way_on_one_device_and_not_in_pieces_of_several() -> None:
    victims = Occupant("a", 6, ("d0",), 1.0), Occupant("b", 6, ("d1",), 2.0), Occupant("c", 4, ("d1",), 3.0)
    assert decide(worker(free=[0, 0], needs=10, victims=victims)) == Preempt("w", ("b", "c"))


def test_a_gang_that_gives_way_frees_all_of_its_devices() -> None:
    victims = Occupant("one", 10, ("d0",), 1.0), Occupant("gang", 20, ("d1", "d2"), 3.0)
    assert decide(worker(free=[0, 0, 0], needs=20, count=2, victims=victims)) == Preempt("w", ("gang",))


def test_slots_count_like_memory() -> None:
    assert decide(worker(free_slot_count=0, victims=(Occupant("r", 1, ("d0",), 1.0),))) == Preempt("w", ("r",))


def test_a_spare_gives_way_to_any_start_and_an_idle_one_only_where_it_may() -> None:
    spare, idle = Occupant("spare", 5, ("d0",)), Occupant("idle", 5, ("d0",), 0.1)
    assert decide(worker(free=[0], victims=(idle, spare)), may_preempt=False) == Preempt("w", ("spare",))
    assert isinstance(decide(worker(free=[0], victims=(idle,)), may_preempt=False), Impossible)


def test_the_worker_where_the_least_is_lost_makes_room() -> None:
    rich = worker("a", free=[0], victims=(Occupant("x", 5, ("d0",), 9.0),))
    poor = worker("b", free=[0], victims=(Occupant("y", 3, ("d0",), 1.0), Occupant("z", 3, ("d0",), 1.0)))
    assert decide(rich, poor) == Preempt("b", ("y", "z"))


@pytest.mark.parametrize("is_restart", [False, True])
def test_promised_replicas_come_back_in_an_order_in_which_they_all_fit(*, is_restart: bool) -> None:
    gpus = tuple(Device(f"cuda:{n}", DeviceKind.CUDA, 10 * GIB, 0) for n in range(2))
    subject = core(known_workers=["w"] if is_restart else [])
    sizes = {"a": 4, "b": 4, "c": 6, "d": 6}
    models = [
        replace(entry(name, min_replicas=1), weights_bytes=size * GIB - 256 * MIB) for name, size in sizes.items()
    ]
    subject.models_replaced(models, 0.0, is_synced=True)
    subject.worker_hello(WorkerHello("w", "1", "node", gpus, ("vllm",), 8, ()), 0.0)
    on_device = {each.model: each.device_ids for each in subject.fleet.replicas()}
    assert sorted(on_device) == ["a", "b", "c", "d"], "by name, a and b would share a device, and d have none"
    assert on_device["c"] != on_device["d"]


def test_a_model_keeps_the_replicas_that_its_policy_promises() -> None:
    gpus = tuple(Device(f"cuda:{n}", DeviceKind.CUDA, 2 * GIB, 0) for n in range(2))
    subject = core()
    subject.models_replaced([entry("a", min_replicas=1), entry("b")], 0.0, is_synced=True)
    idle = tuple(replace(replica(f"a{n}", model="a"), device_ids=(f"cuda:{n}",)) for n in range(2))
    subject.worker_hello(WorkerHello("w", "1", "node", gpus, ("vllm",), 8, idle), 0.0)
    subject.endpoints_acknowledged(frozenset({"127.0.0.1:1000"}), 0.0)
    (worker_,) = subject.fleet.workers()
    victims = subject.lifecycle.room.capacity(worker_, entry("b"), 1000.0).victims
    assert len(victims) == 1, "together they are all that it has"


# Proposals.
def test_moves_are_proposed_where_free_memory_lies_in_pieces() -> None:
    half = [worker(name, free=[5], needs=10, movable=(Occupant(f"on-{name}", 5, ("d0",)),)) for name in ("a", "b")]
    proposal = propose("vllm", half)
    assert proposal is not None
    assert (len(proposal.moves), proposal.moved_bytes) == (1, 5)
    assert proposal.text == "it would fit on a after moving on-a to b"
    assert propose("vllm", half[:1]) is None, "it has nowhere to go"
    assert propose("other", half) is None


WAYS = st.sampled_from(list(Way))


@st.composite
def capacities(draw: st.DrawFn) -> WorkerCapacity:
    """A worker with up to four devices, whose residents take what is not free."""
    size, device_count = 12, draw(st.integers(1, 4))
    count = draw(st.integers(1, 3))
    free = [size] * device_count
    residents: list[Occupant] = []
    for number in range(draw(st.integers(0, 5))):
        ids = draw(st.sets(st.integers(0, device_count - 1), min_size=1, max_size=2))
        share = draw(st.integers(1, 8))
        if any(free[each] < share for each in ids):
            continue
        for each in ids:
            free[each] -= share
        names = tuple(f"d{each}" for each in sorted(ids))
        residents.append(Occupant(f"r{number}", share * len(ids), names, draw(st.integers(1, 9))))
    kinds = draw(st.lists(st.sampled_from(["draining", "victims", "movable", "busy"]), min_size=5, max_size=5))
    groups = {
        name: tuple(each for each, kind in zip(residents, kinds, strict=False) if kind == name)
        for name in ("draining", "victims", "movable")
    }
    ways = {n: {f"d{m}": draw(WAYS) for m in range(device_count) if m != n} for n in range(device_count)}
    devices = tuple(GangDevice(f"d{n}", "CUDA", free[n], draw(st.booleans()), ways[n]) for n in range(device_count))
    return worker(
        draw(st.sampled_from("abc")),
        size=size,
        free=free,
        needs=draw(st.integers(1, 14)) * count,
        count=count,
        devices=devices,
        free_slot_count=draw(st.integers(0, 3)),
        has_gpus=draw(st.booleans()),
        **groups,
    )


def possible(capacity: WorkerCapacity, gone: Iterable[Occupant] = ()) -> bool:
    """Whether it fits, by trying every set of devices."""
    gone = list(gone)
    free = {d.device_id: d.free_bytes + sum(one.share_on(d.device_id) for one in gone) for d in capacity.devices}
    fitting = [d for d in capacity.devices if free[d.device_id] * capacity.device_count >= capacity.needed_bytes]
    if capacity.device_count > 1:
        fitting = [d for d in fitting if not d.is_slice]
    return capacity.free_slot_count + len(gone) > 0 and any(combinations(fitting, capacity.device_count))


@given(st.lists(capacities(), max_size=3, unique_by=lambda each: each.worker_id), st.booleans())
def test_room_is_found_wherever_there_is_any(workers: list[WorkerCapacity], may_preempt: bool) -> None:
    plan = decide(*workers, may_preempt=may_preempt)
    by_id = {each.worker_id: each for each in workers}
    if any(possible(each) for each in workers):
        assert isinstance(plan, Placed)
        _check_devices(by_id[plan.worker_id], plan.device_ids)
        return
    if any(possible(each, each.draining) for each in workers if each.memory_bytes >= each.needed_bytes):
        assert isinstance(plan, Wait)
        return
    sets = [
        (sum(one.value for one in chosen), each.worker_id)
        for each in workers
        if may_preempt and each.memory_bytes >= each.needed_bytes
        for count in range(1, len(each.victims) + 1)
        for chosen in combinations(each.victims, count)
        if possible(each, (*each.draining, *chosen))
    ]
    if not sets:
        assert not isinstance(plan, Placed | Preempt)
        return
    assert isinstance(plan, Preempt)
    on = by_id[plan.worker_id]
    chosen = [victim for victim in on.victims if victim.replica_id in plan.replica_ids]
    assert possible(on, (*on.draining, *chosen))
    assert sum(victim.value for victim in chosen) == min(sets)[0], "no other set of victims costs less"


def _check_devices(capacity: WorkerCapacity, device_ids: tuple[str, ...]) -> None:
    """Never over-committed, never less or more than the gang, never a gang of slices."""
    assert len(set(device_ids)) == len(device_ids) == capacity.device_count
    for device in capacity.devices:
        if device.device_id in device_ids:
            assert device.free_bytes >= capacity.share_bytes
            assert not (capacity.device_count > 1 and device.is_slice)


@given(capacities())
def test_a_gang_gets_the_fastest_ways_that_there_are(capacity: WorkerCapacity) -> None:
    gang = choose_devices(capacity.devices, capacity.share_bytes, capacity.device_count)
    able = [d for d in capacity.devices if d.free_bytes >= capacity.share_bytes]
    if capacity.device_count == 1:
        assert gang == (
            Gang(
                (min(able, key=lambda d: d.free_bytes).device_id,),
                min(d.free_bytes for d in able) - capacity.share_bytes,
            )
            if able
            else None
        )
        return
    gangs = list(combinations([d for d in able if not d.is_slice], capacity.device_count))
    assert (gang is None) is (not gangs)
    if gang is not None:
        slowest = min(max(_ways(each)) for each in gangs)
        assert gang.slowest == slowest
        best = min(sum(_ways(each)) for each in gangs if max(_ways(each)) == slowest)
        assert sum(_ways([d for d in able if d.device_id in gang.device_ids])) == best


def _ways(gang: Sequence[GangDevice]) -> list[Way]:
    return [one.ways[other.device_id] for one, other in combinations(gang, 2)]


@given(st.lists(capacities(), max_size=3, unique_by=lambda each: each.worker_id))
def test_after_the_moves_it_fits_and_every_moved_replica_has_a_place(workers: list[WorkerCapacity]) -> None:
    proposal = propose("vllm", workers)
    if proposal is None:
        return
    assert isinstance(proposal, Proposal)
    by_id = {each.worker_id: each for each in workers}
    target = by_id[proposal.worker_id]
    moved = [each for each in target.movable if each.replica_id in {move.replica_id for move in proposal.moves}]
    assert len(moved) == len(proposal.moves)
    assert possible(target, moved)
    for worker_id in {move.to_worker for move in proposal.moves}:
        there = by_id[worker_id]
        assert worker_id != proposal.worker_id
        assert there.has_gpus is target.has_gpus
        incoming = sum(move.memory_bytes for move in proposal.moves if move.to_worker == worker_id)
        assert sum(max(0, device.free_bytes) for device in there.devices) >= incoming
        assert there.free_slot_count >= sum(move.to_worker == worker_id for move in proposal.moves)


# Against an exact solver.
def _random_cluster(chance: random.Random) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Nodes as lists of devices' memory, and replicas as share and number of devices, together a tenth too many."""
    nodes = [[chance.choice([24, 48, 80])] * chance.choice([1, 2, 4, 8]) for _ in range(chance.randint(3, 6))]
    total = sum(map(sum, nodes))
    replicas: list[tuple[int, int]] = []
    while sum(share * count for share, count in replicas) < 1.1 * total:
        count = chance.choices([1, 2, 4, 8], [70, 15, 10, 5])[0]
        replicas.append((chance.choice([3, 6, 9, 14, 18, 22, 30, 40, 62, 75]), count))
    return nodes, replicas


def _placed_bytes(nodes: list[list[int]], replicas: list[tuple[int, int]]) -> int:
    """Packs them, and adds up what is placed; no device has more than it can hold, and no gang is in pieces."""
    wants = [Want(f"r{number}", share * count, count) for number, (share, count) in enumerate(replicas)]
    places = pack(
        wants,
        [worker(f"w{n}", free=each, size=each[0], free_slot_count=99, has_gpus=True) for n, each in enumerate(nodes)],
    )
    left = {f"w{n}": {f"d{d}": size for d, size in enumerate(memory)} for n, memory in enumerate(nodes)}
    for number, (share, count) in enumerate(replicas):
        place_of = places.get(f"r{number}")
        if place_of is None:
            continue
        assert len(set(place_of.device_ids)) == count
        for device_id in place_of.device_ids:
            left[place_of.worker_id][device_id] -= share
            assert left[place_of.worker_id][device_id] >= 0
    return sum(share * count for n, (share, count) in enumerate(replicas) if f"r{n}" in places)


def _most_bytes(nodes: list[list[int]], replicas: list[tuple[int, int]]) -> float:
    """The most that the solver could place within its time."""
    model = cp_model.CpModel()
    taken: list[list[list[cp_model.IntVar]]] = [[[] for _ in memory] for memory in nodes]
    values = []
    for number, (share, count) in enumerate(replicas):
        on_node = [model.NewBoolVar(f"{number}@{n}") for n in range(len(nodes))]
        model.Add(sum(on_node) <= 1)
        for n, memory in enumerate(nodes):
            on_device = [model.NewBoolVar(f"{number}@{n}.{d}") for d in range(len(memory))]
            model.Add(sum(on_device) == count * on_node[n])
            for d, variable in enumerate(on_device):
                taken[n][d] += [variable] * share
        values.append(share * count * sum(on_node))
    for n, memory in enumerate(nodes):
        for d, size in enumerate(memory):
            model.Add(sum(taken[n][d]) <= size)
    model.Maximize(sum(values))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = 2.0
    solver.parameters.num_workers = 1
    assert solver.Solve(model) in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return solver.ObjectiveValue()


@pytest.mark.parametrize("seed", range(5))
def test_what_is_placed_is_within_a_twentieth_of_the_optimum(seed: int) -> None:
    nodes, replicas = _random_cluster(random.Random(seed))
    assert _placed_bytes(nodes, replicas) >= 0.95 * _most_bytes(nodes, replicas)
