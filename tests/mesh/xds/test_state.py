"""The pure part of the ADS server: for any order of events, Envoys get the newest endpoints and lies about them are
impossible.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.mesh.errors import Bug, InvalidRequest
from helios.mesh.xds.state import NO_VERSION, Answer, Endpoint, Push, XdsState

A, B = Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 2)
SUBSCRIBE = Answer(subscribe=True)


def ack(push: Push[Endpoint]) -> Answer:
    return Answer(nonce=push.nonce)


def nack(push: Push[Endpoint]) -> Answer:
    return Answer(nonce=push.nonce, error="refused")


def opened(*endpoints: Endpoint) -> XdsState[Endpoint]:
    state = XdsState[Endpoint]()
    state.open()
    state.publish(endpoints)
    return state


def subscribed(state: XdsState[Endpoint], node: str = "edge") -> tuple[int, Push[Endpoint]]:
    stream = state.connect(node)
    state.handle(stream, SUBSCRIBE)
    push = state.next_push(stream)
    assert push is not None
    return stream, push


def test_nothing_is_sent_before_open() -> None:
    state = XdsState[Endpoint]()
    state.publish([A])
    stream = state.connect("edge")
    state.handle(stream, SUBSCRIBE)
    assert state.next_push(stream) is None
    state.open()
    assert state.next_push(stream) is not None


def test_nothing_is_sent_before_the_first_publish() -> None:
    state = XdsState[Endpoint]()
    state.open()
    stream = state.connect("edge")
    state.handle(stream, SUBSCRIBE)
    assert state.next_push(stream) is None


def test_an_empty_set_is_published_too() -> None:
    state = opened()
    assert subscribed(state)[1].entries == frozenset()


def test_a_version_is_acknowledged_only_by_an_ack() -> None:
    state = opened(A)
    stream, push = subscribed(state)
    assert not state.is_acked(push.version)
    state.handle(stream, ack(push))
    assert state.is_acked(push.version)


def test_without_an_envoy_nothing_is_acknowledged() -> None:
    state = opened(A)
    assert not state.is_acked(1)
    stream, push = subscribed(state)
    state.handle(stream, ack(push))
    state.disconnect(stream)
    assert not state.is_acked(1)


def test_every_connected_envoy_counts_from_its_first_word() -> None:
    state = opened(A)
    first, push = subscribed(state, "one")
    state.handle(first, ack(push))
    second = state.connect("two")
    assert not state.is_acked(1)
    assert state.is_acked(1, "one")
    assert not state.is_acked(1, "two")
    assert state.lagging(1) == {"two"}
    state.disconnect(second)
    assert state.is_acked(1)


def test_a_nack_is_counted_and_not_sent_again_until_something_changes() -> None:
    state = opened(A)
    stream, push = subscribed(state)
    assert state.handle(stream, nack(push)) == "refused"
    assert state.next_push(stream) is None
    assert not state.is_acked(push.version)
    state.publish([A, B])
    again = state.next_push(stream)
    assert again is not None
    assert again.version == 2
    assert state.statistics().nack_count == 1


def test_a_slow_envoy_skips_versions() -> None:
    state = opened(A)
    stream, push = subscribed(state)
    state.publish([B])
    state.publish([A, B])
    assert state.next_push(stream) is None, "one push is under way"
    state.handle(stream, ack(push))
    newest = state.next_push(stream)
    assert newest is not None
    assert (newest.version, newest.entries) == (3, frozenset({A, B}))


def test_publishing_the_same_again_is_no_change() -> None:
    state = opened(A, B)
    assert state.publish([B, A, A]) == 1


def test_an_answer_with_an_old_nonce_says_nothing() -> None:
    state = opened(A)
    stream, push = subscribed(state)
    state.handle(stream, Answer(unsubscribe=True))
    state.handle(stream, ack(push))
    assert not state.is_acked(1)
    state.handle(stream, SUBSCRIBE)
    assert state.next_push(stream) is not None


def test_waiting_for_what_was_never_published_is_a_bug() -> None:
    with pytest.raises(Bug):
        opened(A).is_acked(2)


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        "127.0.0.1:",
        ":1",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "host:1",
        "127.0.0.1:+1",
        "1.2.3:4",
        "[::1]",
        "127.0.0.1:²",
    ],
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Endpoint.parse(text)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_an_endpoint_reads_back(ip: object, port: int) -> None:
    endpoint = Endpoint(str(ip), port)
    assert Endpoint.parse(str(endpoint)) == endpoint


@dataclass
class _Envoy:
    """A model of an Envoy: what it routes by, and the push that it has not answered yet."""

    routes: frozenset[Endpoint] = frozenset()
    version: int = NO_VERSION
    unanswered: Push[Endpoint] | None = None
    is_subscribed: bool = False
    refused: set[int] = field(default_factory=set)


class XdsMachine(RuleBasedStateMachine):
    """Any number of Envoys that come, go, accept and refuse while endpoints change."""

    def __init__(self) -> None:
        super().__init__()
        self.state = XdsState[Endpoint]()
        self.envoys: dict[int, _Envoy] = {}
        self.published: dict[int, frozenset[Endpoint]] = {}

    @initialize(is_open=st.booleans())
    def start(self, *, is_open: bool) -> None:
        if is_open:
            self.state.open()

    @rule()
    def open(self) -> None:
        self.state.open()

    @rule(ports=st.sets(st.integers(1, 4)))
    def publish(self, ports: set[int]) -> None:
        endpoints = frozenset(Endpoint("127.0.0.1", port) for port in ports)
        version = self.state.publish(endpoints)
        assert self.published.setdefault(version, endpoints) == endpoints

    @rule(node=st.sampled_from(["one", "two"]))
    def connect(self, node: str) -> None:
        self.envoys[self.state.connect(node)] = _Envoy()

    @precondition(lambda self: self.envoys)
    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        stream = self._draw(data)
        self.state.disconnect(stream)
        del self.envoys[stream]

    @precondition(lambda self: self.envoys)
    @rule(data=st.data(), is_on=st.booleans())
    def subscribe(self, data: st.DataObject, *, is_on: bool) -> None:
        stream = self._draw(data)
        self.state.handle(stream, Answer(subscribe=is_on, unsubscribe=not is_on))
        self.envoys[stream].is_subscribed = is_on

    @precondition(lambda self: self.envoys)
    @rule(data=st.data())
    def push(self, data: st.DataObject) -> None:
        stream = self._draw(data)
        pushed = self.state.next_push(stream)
        if pushed is not None:
            assert self.state.is_open
            assert self.envoys[stream].is_subscribed
            assert pushed.version == self.state.version
            assert pushed.entries == self.published[pushed.version]
            self.envoys[stream].unanswered = pushed

    @precondition(lambda self: any(envoy.unanswered for envoy in self.envoys.values()))
    @rule(data=st.data(), is_fine=st.booleans())
    def answer(self, data: st.DataObject, *, is_fine: bool) -> None:
        stream = data.draw(st.sampled_from([key for key, envoy in self.envoys.items() if envoy.unanswered]))
        envoy = self.envoys[stream]
        assert envoy.unanswered is not None
        if is_fine:
            envoy.routes, envoy.version = envoy.unanswered.entries, envoy.unanswered.version
            self.state.handle(stream, ack(envoy.unanswered))
        else:
            self.state.handle(stream, nack(envoy.unanswered))
        envoy.unanswered = None

    @invariant()
    def acknowledged_means_that_every_envoy_routes_by_it(self) -> None:
        for version in self.published:
            if self.state.is_acked(version):
                assert self.envoys
                assert all(envoy.version >= version for envoy in self.envoys.values())

    def teardown(self) -> None:
        """Whatever happened: Envoys that accept everything end with the newest endpoints, and ``is_acked`` says so."""
        if not (self.envoys and self.published):
            return
        self.state.open()
        newest = self.state.publish([Endpoint("127.0.0.1", 9)])
        for stream, envoy in self.envoys.items():
            if envoy.unanswered is not None:
                self.state.handle(stream, ack(envoy.unanswered))
            self.state.handle(stream, SUBSCRIBE)
            push = self.state.next_push(stream)
            assert push is not None
            assert push.version == newest
            self.state.handle(stream, ack(push))
            assert self.state.next_push(stream) is None, "no push without news"
        assert self.state.is_acked(newest)
        assert self.state.lagging(newest) == frozenset()

    def _draw(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.envoys)))


TestXdsMachine = XdsMachine.TestCase
