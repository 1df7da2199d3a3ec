"""What a gateway tells of its picks, whatever becomes of the calls that tell it."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.api.proxy.v1 import lane_service_pb2 as lane_pb
from tests.mesh.envoy.lane_gateway import PATIENCE_SECONDS, RENEW_SECONDS, Gateway, Request, answer, chat

NO_ANSWER = b"\0\0\0\0\1\7"


class EachPickIsToldOfOnceOrCounted(RuleBasedStateMachine):
    """Requests come, ask, are answered, late or never; what answered calls told adds up to what was picked.

    Of requests that ask at once, only the last one's answer counts: the others' calls took too long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gateway = Gateway()
        self.done: list[Request] = []
        self.asking: list[Request] = []
        self.last: Request | None = None
        self.asked_at = 0.0
        self.told: list[str] = []
        self.untold_count = 0

    @rule()
    def comes(self) -> None:
        request = self.gateway.begin(chat())
        if not request.waits_for:
            self.done.append(request)
            return
        assert self.last is None or self.gateway.now_seconds >= self.asked_at + PATIENCE_SECONDS, "two ask at once"
        self.asking.append(request)
        self.last, self.asked_at = request, self.gateway.now_seconds

    @rule(seconds=st.sampled_from([0.01, RENEW_SECONDS, PATIENCE_SECONDS, 0.3, 1.0]))
    def waits(self, seconds: float) -> None:
        self.gateway.sleep(seconds)

    @precondition(lambda self: self.asking)
    @rule(
        data=st.data(),
        said=st.sampled_from(
            [answer(0.5, 0.5), answer(0.5, 0.5), lane_pb.RenewResponse(renew_milliseconds=50), NO_ANSWER]
        ),
    )
    def is_answered(self, data: st.DataObject, said: lane_pb.RenewResponse | bytes) -> None:
        request = self._next(data)
        if request is self.last:
            self.told += [pick.request_id for pick in request.asked.picks]
            self.untold_count += request.asked.untold_count
            self.last = None
        request.answered(said)

    @precondition(lambda self: self.asking)
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        request = self._next(data)
        self.last = None if request is self.last else self.last
        request.answered(None, status="503")

    @precondition(lambda self: self.asking)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        del self.asking[data.draw(st.integers(0, len(self.asking) - 1))]

    def _next(self, data: st.DataObject) -> Request:
        request = self.asking.pop(data.draw(st.integers(0, len(self.asking) - 1)))
        self.done.append(request)
        return request

    @invariant()
    def nothing_is_told_twice(self) -> None:
        assert len(self.told) == len(set(self.told))

    def teardown(self) -> None:
        self.gateway.sleep(10)
        rest = self.gateway.renew(lane_pb.RenewResponse())
        told = {*self.told, *(pick.request_id for pick in rest.picks)}
        picked = {request.headers["x-request-id"] for request in self.done if request.is_picked}
        assert told <= picked
        assert len(told) == len(self.told) + len(rest.picks)
        assert len(told) + self.untold_count + rest.untold_count == len(picked)


TestEachPickIsToldOfOnceOrCounted = EachPickIsToldOfOnceOrCounted.TestCase
