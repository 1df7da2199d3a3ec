"""Who leads, where a worker says otherwise or the registry can't be asked, and what followers have promised."""

from tests.proxy.peers_world import leader_of, settled


def test_a_worker_that_is_wrong_about_a_later_leader_moves_no_lead() -> None:
    world = settled()
    subject = world.nodes["p1"].core
    subject.leadership.claimed("w1", 9, world.now)
    world.request("p1", "a", 60)
    assert not subject.lifecycle.is_open, "what is true is not known yet"
    world.go_well(2)
    assert (world.leaders(), subject.leadership.epoch) == (["p1"], 1)
    assert [error for _, error in world.nodes["p1"].answered] == [None]
    # It is not asked about again for a while, whatever it says.
    subject.leadership.claimed("w1", 10, world.now)
    assert subject.lifecycle.is_open
    subject.leadership.claimed("w2", 10, world.now)
    assert not subject.lifecycle.is_open


def test_no_worker_keeps_everybody_from_the_lead() -> None:
    world = settled()
    for node in world.nodes.values():
        for epoch in (9, (1 << 64) - 1):
            node.core.leadership.claimed("w1", epoch, world.now)
    world.kill("p1")
    world.go_well(12)
    assert (world.leaders(), world.lease.epoch) == (["p2"], 2)


def test_a_doubted_leader_that_can_not_ask_follows() -> None:
    world = settled()
    world.cut.add(frozenset(("p1", "registry")))
    world.nodes["p1"].core.leadership.claimed("w1", 9, world.now)
    world.pass_time(0.1)
    assert world.leaders() == []


def test_a_registry_that_forgot_leaders_grants_an_epoch_above_what_most_workers_know() -> None:
    world = settled()
    leadership = world.nodes["p1"].core.leadership
    for machine in world.machines.values():
        machine.epoch = 9
        leadership.claimed(machine.worker_id, 9, world.now)
    world.go_well(3)
    assert (world.leaders(), leadership.epoch) == (["p1"], 10)
    world.request("p2", "a", 60)
    world.go_well(2)
    assert [error for _, error in world.nodes["p2"].answered] == [None]


def test_an_answer_of_before_a_doubt_does_not_end_it() -> None:
    world = settled()
    node = world.nodes["p1"]
    asked_at = world.now
    world.now += 0.1
    node.core.leadership.claimed("w1", 9, world.now)
    node.role.renewed(1, asked_at, world.now)
    assert node.core.leadership.doubted_at is not None
    world.ask_registry("p1")
    assert node.core.leadership.doubted_at is None


def test_a_leader_that_is_cut_off_beside_a_proxy_it_never_knew_ends_with_the_word_of_a_worker() -> None:
    world = settled(1)
    world.cut |= {frozenset(("p1", "registry")), frozenset(("p1", "p2"))}
    world.go_well(8)
    assert world.spend("p1", 10), "nobody else is known to count"
    world.start_proxy("p2")
    world.go_well(8)
    assert world.leaders() == ["p2"]
    assert not world.spend("p1", 10)


def test_a_follower_s_promise_holds_over_its_sessions_and_not_over_its_runs() -> None:
    world = settled()
    leadership = world.nodes["p1"].core.leadership
    world.cut.add(frozenset(("p1", "registry")))
    leadership.lease_until = world.now
    assert leadership.may_spend(world.now)
    world.break_session("p2")
    assert not leadership.may_spend(world.now), "it may be another run by now, which promised nothing"
    world.connect_follower("p2")
    assert leadership.may_spend(world.now)
    world.break_session("p2")
    world.nodes["p2"].incarnation = "another"
    world.connect_follower("p2")
    assert not leadership.may_spend(world.now)


def test_a_leader_follows_where_another_proxy_has_heard_of_a_later_one() -> None:
    world = settled()
    world.nodes["p1"].core.leadership.outdone(9, world.now)
    assert world.leaders() == []
    world.go_well(10)
    assert len(world.leaders()) == 1
    assert world.nodes[leader_of(world)].core.leadership.epoch > 9
