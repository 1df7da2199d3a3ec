"""Several cores, their workers, a registry's lease, and a network that a test breaks. No clock, no tasks."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from helios.mesh.errors import HeliosError
from helios.proxy import actions
from helios.proxy.admission.keyring import Caller
from helios.proxy.core import STALE_LEADER, Core
from helios.proxy.fleet.commands import Command, DrainReplica, Fence, StartReplica, StopReplica
from helios.proxy.fleet.state import Replica, ReplicaState
from helios.proxy.holds import Hold
from helios.proxy.peers.messages import Hello, News, Report
from helios.proxy.peers.role import Ask, Role
from tests.proxy.support import GIB, core, counter, entry, hello, policy

TTL_SECONDS = 6.0
KEY = Caller("key", "tenant", tokens_per_minute=600)


@dataclass
class FakeLease:
    """The registry's row."""

    holder: str = ""
    epoch: int = 0
    until: float = 0.0


@dataclass
class Session:
    """A session between a follower and a leader; what is on its way is in the queues."""

    leader: str
    name: str
    up: deque[Report] = field(default_factory=deque)
    down: deque[News] = field(default_factory=deque)


@dataclass
class Node:
    """A proxy that lives."""

    core: Core
    role: Role
    incarnation: str
    waiting: dict[int, Hold] = field(default_factory=dict)
    answered: list[tuple[Hold, HeliosError | None]] = field(default_factory=list)
    session: Session | None = None


@dataclass
class Machine:
    """A worker: what it holds, and what is on its way from and to each proxy."""

    worker_id: str
    epoch: int = 0
    sequence: int = 0
    replicas: dict[str, Replica] = field(default_factory=dict)
    commands: dict[str, deque[tuple[int, Command]]] = field(default_factory=dict)
    events: dict[str, deque[Callable[[Core, float], list[actions.Action]]]] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)


class World:
    """Proxies p1, p2, …, and workers w1, w2. Every step is a method; nothing moves by itself."""

    def __init__(self, proxy_count: int) -> None:
        self.now = 1000.0
        self.lease = FakeLease()
        self.nodes: dict[str, Node] = {}
        self.machines = {name: Machine(name) for name in ("w1", "w2")}
        self.cut: set[frozenset[str]] = set()
        self.spent: list[tuple[float, int]] = []
        self._running: dict[str, tuple[str, float, int]] = {}
        self._new_id = counter()
        self._port = 1000
        self._next_tick = 0.0
        for number in range(1, proxy_count + 1):
            self.start_proxy(f"p{number}")

    # Proxies.
    def start_proxy(self, name: str) -> None:
        """A proxy comes up; all workers dial it."""
        subject = core(policy(resync_seconds=5.0), now=self.now)
        subject._commands._new_id = lambda: f"{name}-{self._new_id()}"
        subject.lifecycle._starts._new_id = lambda: f"r-{self._new_id()}"
        role = Role(subject.leadership, ttl_seconds=TTL_SECONDS)
        node = self.nodes[name] = Node(subject, role, self._new_id())
        subject.leadership.follow(self.now)
        self.apply(name, subject.models_replaced([entry(model) for model in "abc"], self.now, is_synced=True))
        for machine in self.machines.values():
            self.dial(name, machine)
        assert node is self.nodes[name]

    def dial(self, name: str, machine: Machine) -> None:
        """A worker's hello reaches a proxy, and the proxy's welcome the worker."""
        subject = self.nodes[name].core
        machine.commands[name], machine.events[name] = deque(), deque()
        told = hello(machine.worker_id, replicas=tuple(machine.replicas.values()), memory_bytes=3 * GIB)
        # Believed numbers start anew with each hello of another incarnation.
        told = replace(told, incarnation=f"{self._new_id()}")
        self.apply(name, subject.worker_hello(told, self.now))
        machine.epoch = max(machine.epoch, subject.leadership.epoch)

    def kill(self, name: str) -> None:
        """A proxy is gone, and what it held and ran with it."""
        del self.nodes[name]
        for machine in self.machines.values():
            machine.commands.pop(name)
            machine.events.pop(name)
        for node in self.nodes.values():
            if node.session is not None and node.session.leader == name:
                node.session = None
        self._end_sessions_of(name)

    def apply(self, name: str, todo: list[actions.Action]) -> None:
        """Carries actions out, as the runtime does."""
        node = self.nodes[name]
        for action in todo:
            match action:
                case actions.Send(command):
                    machine = self.machines[command.worker_id]
                    machine.commands[name].append((command.epoch, command))
                case actions.Release(hold, _):
                    node.answered.append((node.waiting.pop(hold.hold_id), None))
                case actions.Fail(hold, error):
                    node.answered.append((node.waiting.pop(hold.hold_id), error))
                case actions.ActivationFailed():
                    node.core.leadership.followers.failed(action)
                case _:
                    pass

    def request(self, name: str, model: str, seconds: float) -> bool:
        """A request comes to a proxy; whether it was picked or refused at once."""
        node = self.nodes[name]
        request_id = self._new_id()
        if node.core.pick(entry(model), request_id, self.now) is not None:
            return True
        try:
            hold, todo = node.core.hold(
                entry(model), request_id, size_bytes=1, deadline=self.now + seconds, now=self.now
            )
        except HeliosError:
            return True
        node.waiting[hold.hold_id] = hold
        self.apply(name, todo)
        return False

    # Limits.
    def spend(self, name: str, tokens: int) -> bool:
        """A request of the key comes to a proxy; whether it is let in."""
        node = self.nodes[name]
        request_id = self._new_id()
        try:
            node.core.traffic.quotas.admit(KEY, request_id, "a", body_bytes=0, max_tokens=tokens, now=self.now)
        except HeliosError:
            return False
        held = node.core.traffic.quotas._held[request_id]
        self._running[request_id] = (name, self.now, held.tokens)
        self.spent.append((self.now, held.tokens))
        return True

    def settle(self, share: float) -> None:
        """The oldest request that runs has taken a share of what it reserved."""
        if not self._running:
            return
        request_id, (name, since, reserved) = next(iter(self._running.items()))
        del self._running[request_id]
        if name not in self.nodes:
            return
        quotas = self.nodes[name].core.traffic.quotas
        held = quotas._take(request_id)
        if held is None or held.bucket is None:
            return
        actual = int(share * reserved)
        held.bucket.settle(held.tokens, actual, self.now)
        self.spent[self.spent.index((since, reserved))] = (since, actual)

    # The network.
    def is_cut(self, *ends: str) -> bool:
        """Whether two cannot reach each other."""
        return frozenset(ends) in self.cut

    def ask_registry(self, name: str) -> None:
        """A proxy asks for the lease or renews it, where that is due."""
        node = self.nodes[name]
        ask = node.role.due(self.now)
        if ask is None:
            return
        if self.is_cut(name, "registry"):
            node.role.unreachable(self.now)
            return
        lease, epoch = self.lease, node.core.leadership.epoch
        is_free = self.now >= lease.until or not lease.holder
        if ask is Ask.RENEW:
            if not is_free and (lease.holder, lease.epoch) == (name, epoch):
                lease.until = self.now + TTL_SECONDS
                node.role.renewed(epoch, self.now, self.now)
            else:
                node.role.lost(epoch, "" if is_free else lease.holder, self.now)
        elif is_free or lease.holder == name:
            seen = node.core.leadership.believed_epoch
            self.lease = FakeLease(name, max(lease.epoch, seen) + 1, self.now + TTL_SECONDS)
            node.role.granted(self.lease.epoch, self.now, self.now)
        else:
            node.role.refused(lease.holder, lease.epoch, lease.until - self.now, self.now)
        self.apply(name, node.core.follow_up(self.now))

    def connect_follower(self, name: str) -> None:
        """A follower dials the leader that it knows of."""
        node = self.nodes[name]
        leader = self.nodes.get(node.role.leader_address)
        if node.core.leadership.leads or node.session is not None or leader is None or leader is node:
            return
        leadership = leader.core.leadership
        if self.is_cut(name, node.role.leader_address):
            return
        leader.role.outdone(node.core.leadership.seen_epoch, self.now)
        if not leadership.epoch:
            node.core.leadership.released()
            return
        session = leadership.connect(Hello(name, node.incarnation, node.core.leadership.seen_epoch), self.now)
        node.core.leadership.begin_session(self.now)
        node.session = Session(node.role.leader_address, session)

    def talk(self, name: str) -> None:
        """A follower and its leader say what there is to say; it is on its way then."""
        node = self.nodes[name]
        session = node.session
        if session is None:
            return
        leader = self.nodes[session.leader].core.leadership
        if node.core.leadership.leads or not leader.followers.is_connected(session.name):
            self.break_session(name)
            return
        session.up.append(node.core.leadership.own_report(self.now))
        session.down.append(leader.news(session.name, self.now))

    def deliver(self, name: str) -> None:
        """What is on its way between a follower and its leader arrives."""
        node = self.nodes[name]
        session = node.session
        while session is not None and session.up:
            leader = self.nodes[session.leader].core
            report = session.up.popleft()
            if leader.leadership.followers.is_connected(session.name):
                leader.leadership.report(session.name, report, self.now)
                self.apply(session.leader, leader.follow_up(self.now))
        while session is not None and session.down:
            node.core.leadership.heard(session.down.popleft(), self.now)
            self.apply(name, node.core.follow_up(self.now))

    def break_session(self, name: str) -> None:
        """A session breaks; what was on its way is lost, and each end knows."""
        node = self.nodes[name]
        session, node.session = node.session, None
        if session is not None and session.leader in self.nodes:
            self.nodes[session.leader].core.leadership.disconnect(session.name, self.now)

    def _end_sessions_of(self, name: str) -> None:
        for node in self.nodes.values():
            followers = node.core.leadership.followers
            for session in followers.sessions():
                if session.startswith(f"{name}/"):
                    node.core.leadership.disconnect(session, self.now)

    # Workers.
    def obey(self, machine: Machine, name: str) -> None:
        """A worker takes the next command of a proxy, and answers."""
        queue = machine.commands.get(name)
        if not queue:
            return
        epoch, command = queue.popleft()
        refused = STALE_LEADER if epoch < machine.epoch else ""
        machine.epoch = max(machine.epoch, epoch)
        if not refused and command.command_id not in machine.done:
            machine.done[command.command_id] = self._carry_out(machine, command)
        claimed = machine.epoch if refused else 0

        def acknowledged(subject: Core, now: float) -> list[actions.Action]:
            subject.leadership.claims.note(machine.worker_id, claimed)
            return subject.command_acknowledged(
                machine.worker_id, command.command_id, refused_reason=refused, message="", now=now
            )

        machine.events[name].append(acknowledged)

    def _carry_out(self, machine: Machine, command: Command) -> str:
        match command.order:
            case StartReplica() as order:
                machine.replicas[order.replica_id] = Replica(
                    order.replica_id,
                    order.model,
                    order.revision,
                    ReplicaState.LOADING,
                    machine.worker_id,
                    memory_bytes=order.memory_bytes,
                )
                self.tell(machine, machine.replicas[order.replica_id])
            case DrainReplica(replica_id) | StopReplica(replica_id):
                gone = machine.replicas.pop(replica_id, None)
                if gone is not None:
                    self.tell(machine, replace(gone, state=ReplicaState.STOPPED))
            case Fence():
                pass
            case _:
                pass
        return ""

    def tell(self, machine: Machine, changed: Replica) -> None:
        """A worker tells every proxy of a replica."""
        machine.sequence += 1
        sequence = machine.sequence
        for queue in machine.events.values():
            queue.append(lambda subject, now: subject.replica_event(machine.worker_id, sequence, changed, now))

    def hear(self, machine: Machine, name: str) -> None:
        """The next thing that a worker said reaches a proxy."""
        queue = machine.events.get(name)
        if not queue or name not in self.nodes:
            return
        subject = self.nodes[name].core
        self.apply(name, subject.worker_seen(machine.worker_id, self.now))
        self.apply(name, queue.popleft()(subject, self.now))
        self.acknowledge_endpoints(name)

    def acknowledge_endpoints(self, name: str) -> None:
        """Every Envoy knows what a proxy publishes."""
        subject = self.nodes[name].core
        self.apply(name, subject.endpoints_acknowledged(subject.fleet.endpoints(), self.now))

    def finish_starts(self, *, fails: bool = False) -> None:
        """What starts is ready, or failed."""
        for machine in self.machines.values():
            for item in list(machine.replicas.values()):
                if not item.state.is_starting:
                    continue
                if fails:
                    del machine.replicas[item.replica_id]
                    self.tell(machine, replace(item, state=ReplicaState.FAILED, failure_reason="ENGINE_DIED"))
                    continue
                self._port += 1
                done = replace(item, state=ReplicaState.READY, address=f"127.0.0.1:{self._port}")
                machine.replicas[item.replica_id] = done
                self.tell(machine, done)

    # Time.
    def pass_time(self, seconds: float) -> None:
        """Time passes; what each proxy does by the clock happens, and nothing arrives."""
        self.now += seconds
        is_tick = self.now >= self._next_tick
        self._next_tick = self.now + 1 if is_tick else self._next_tick
        for name in list(self.nodes):
            subject = self.nodes[name].core
            for machine in self.machines.values():
                self.apply(name, subject.worker_seen(machine.worker_id, self.now))
            self.acknowledge_endpoints(name)
            self.apply(name, subject.expire_holds(self.now))
            if is_tick:
                self.apply(name, subject.tick(self.now))
            self.ask_registry(name)
            self.connect_follower(name)
            if self.nodes[name].session is not None and self.is_cut(name, self.nodes[name].session.leader):  # type: ignore[union-attr]
                self.break_session(name)
            self.talk(name)

    def go_well(self, seconds: float, *, fails: bool = False) -> None:
        """Everything arrives at once, for a while."""
        for _ in range(round(seconds * 4)):
            self.pass_time(0.25)
            for name in list(self.nodes):
                self.deliver(name)
            for machine in self.machines.values():
                for name in list(self.nodes):
                    while machine.commands[name]:
                        self.obey(machine, name)
                for name in list(self.nodes):
                    while machine.events[name]:
                        self.hear(machine, name)
            self.finish_starts(fails=fails)

    def leaders(self) -> list[str]:
        """Proxies that believe to lead."""
        return [name for name, node in self.nodes.items() if node.core.leadership.epoch]

    def starting(self, model: str) -> list[Replica]:
        """Replicas of a model that start at workers, and that no proxy has taken back."""
        return [
            item
            for machine in self.machines.values()
            for item in machine.replicas.values()
            if item.model == model and item.state.is_starting
        ]

    def most_in_a_window(self) -> float:
        """By how many tokens the fullest window of what was let in exceeds the key's limit; negative: it does not."""
        spent = sorted(self.spent)
        worst = -float(KEY.tokens_per_minute)
        for first, (begin, _) in enumerate(spent):
            total = 0
            for at, tokens in spent[first:]:
                total += tokens
                worst = max(worst, total - KEY.tokens_per_minute * (1 + (at - begin) / 60))
        return worst


def settled(proxy_count: int = 2) -> World:
    """Proxies of which one leads and the others follow."""
    world = World(proxy_count)
    world.go_well(2)
    return world


def leader_of(world: World) -> str:
    """The one proxy that believes to lead."""
    (leader,) = world.leaders()
    return leader
