"""The lane's picker as Envoy runs it, in LuaJIT: requests with headers and bodies, a proxy that answers, and a clock.

Handles are as strict as Envoy's: whatever was taken from one before its request waited is dead afterwards. A request
waits until a test goes on with it, or never does, as where its client has left.
"""

from functools import cache
from importlib import import_module
from typing import Any, Final

import orjson
from google.api import httpbody_pb2

from helios.api.proxy.v1 import lane_service_pb2 as lane_pb
from helios.mesh.envoy import clusters, filters
from helios.mesh.names import (
    ANSWER_FIELDS,
    COHORT_HEADER,
    ENDPOINT_HEADER,
    LANE_HEADER,
    MAX_RETRIES_HEADER,
    METADATA_NAMESPACE,
    REQUEST_ID_HEADER,
    ROUTE_REVISION_HEADER,
    SESSION_FIELDS,
)

# Its stubs know of strings only, and bodies are bytes.
luajit: Any = import_module("lupa.luajit21")
MODEL: Final = "m"
LEASE_SECONDS: Final = 0.5
# Sums of it are exact.
RENEW_SECONDS: Final = 0.125
# How long a request waits for an answer (lane.lua).
PATIENCE_SECONDS: Final = 0.25
FRAME_BYTES: Final = 5

# The module `ffi` that the script gets is LuaJIT's own, but for the one function of C that it calls.
_ENVOY: Final = rb"""
local now = {seconds = 1000, nanoseconds = 0}
package.loaded.ffi = setmetatable({C = {clock_gettime = function(clock, time)
  assert(clock == 1, "another clock than the monotonic one")
  time.seconds, time.nanoseconds = now.seconds, now.nanoseconds
end}}, {__index = require("ffi")})

function set_clock(seconds, nanoseconds) now.seconds, now.nanoseconds = seconds, nanoseconds end

-- An object whose methods fail once its request has waited.
local function living(request, methods)
  local turn, object = request.turn, {}
  for name, method in pairs(methods) do
    object[name] = function(_, ...)
      assert(request.turn == turn, "a handle was used after its request had waited: " .. name)
      return method(...)
    end
  end
  return object
end

function new_request(headers, body, lifted)
  local request = {headers = headers, turn = 0, errors = {}}
  local function wait(...)
    request.turn = request.turn + 1
    return coroutine.yield(...)
  end
  local handle = {}
  function handle:headers()
    return living(request, {
      get = function(name) return headers[name] end,
      replace = function(name, value)
        assert(type(name) == "string" and type(value) == "string", "a header is text")
        headers[name] = value
      end,
      remove = function(name) headers[name] = nil end,
    })
  end
  function handle:body()
    if not request.has_body then
      wait("body")
      request.has_body = true
    end
    return body and living(request, {
      length = function() return #body end,
      getBytes = function(from, count) return string.sub(body, from + 1, from + count) end,
    })
  end
  function handle:httpCall(cluster, fields, message, milliseconds)
    return wait("call", cluster, fields, message, milliseconds)
  end
  function handle:streamInfo()
    return living(request, {dynamicMetadata = function()
      return living(request, {get = function(namespace) return lifted[namespace] end})
    end})
  end
  function handle:logErr(text) request.errors[#request.errors + 1] = text end
  request.thread = coroutine.create(function() envoy_on_request(handle) end)
  return request
end

function go_on(request, ...)
  local found = {coroutine.resume(request.thread, ...)}
  if not found[1] then error(debug.traceback(request.thread, found[2]), 0) end
  return unpack(found, 2)
end
"""


@cache
def script() -> bytes:
    """The source that the filter has, with the names in front of it."""
    code = filters.lane().default_source_code
    assert code is not None
    source: str | None = code.inline_string
    assert source is not None
    return source.encode()


def candidates(*scores: float, **more: Any) -> list[lane_pb.LaneCandidate]:
    """Replicas r0, r1, … at 10.0.0.0:80, 10.0.0.1:80, …"""
    return [
        lane_pb.LaneCandidate(replica_id=f"r{number}", address=address_of(number), fixed_score=score, **more)
        for number, score in enumerate(scores)
    ]


def address_of(number: int) -> str:
    """Where r0, r1, … listens."""
    return f"10.0.0.{number}:80"


def answer(*scores: float, **more: Any) -> lane_pb.RenewResponse:
    """What a proxy says as a rule: replicas with these scores may be picked, and the next two be tried."""
    usual: dict[str, Any] = {
        "lease_milliseconds": round(LEASE_SECONDS * 1000),
        "renew_milliseconds": round(RENEW_SECONDS * 1000),
        "revision": "sha256:1",
        "seed": 0x8000_0000_0000_0001,
        "candidates": candidates(*scores),
        "retry_count": 2,
        "running_weight": 0.25,
        "prefix_weight": 0.5,
    }
    return lane_pb.RenewResponse(**(usual | more))


def framed(data: bytes) -> bytes:
    """A REST body as Envoy has it after transcoding (`helios.proxy.picker.request`)."""
    return grpc_frame(httpbody_pb2.HttpBody(content_type="application/json", data=data).SerializeToString())


def grpc_frame(message: bytes) -> bytes:
    """A message as gRPC sends it."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def chat(text: str = "") -> bytes:
    """A chat's JSON with such a message."""
    return b'{"model":"m","messages":[{"role":"user","content":"' + text.encode() + b'"}],"stream":true}'


def lifted_from(body: bytes) -> dict[str, Any]:
    """What Envoy lifts from a body (`filters.lift`)."""
    try:
        document = orjson.loads(body)
    except ValueError:
        return {}
    fields = (
        {name: document.get(name) for name in (*SESSION_FIELDS, *ANSWER_FIELDS)} if isinstance(document, dict) else {}
    )
    return {
        name: value.encode(errors="replace") if isinstance(value, str) else value
        for name, value in fields.items()
        if isinstance(value, str | int | float)
    }


class Request:
    """A request in the filter: it is done, or waits for its body or for an answer."""

    def __init__(self, gateway: "Gateway", body: bytes | None, headers: dict[str, str], lifted: dict[str, Any]) -> None:
        self._gateway = gateway
        table = gateway.lua.table_from({name.encode(): value.encode() for name, value in headers.items()})
        fields = gateway.lua.table_from({name.encode(): value for name, value in lifted.items()})
        namespaces = gateway.lua.table_from({METADATA_NAMESPACE.encode(): fields} if lifted else {})
        self._request = gateway.lua.globals()[b"new_request"](table, body, namespaces)
        self.waits_for = ""
        self._asked = b""
        self._go_on()

    def _go_on(self, *values: Any) -> None:
        found = self._gateway.lua.globals()[b"go_on"](self._request, *values)
        self.waits_for = ""
        if isinstance(found, tuple):
            cluster, fields, message, milliseconds = found[1:]
            assert cluster == clusters.PICKER.encode()
            assert dict(fields)[b":path"] == b"/helios.api.proxy.v1.LaneService/Renew"
            assert milliseconds == PATIENCE_SECONDS * 1000
            assert message == grpc_frame(message[FRAME_BYTES:])
            self._asked, self.waits_for = message[FRAME_BYTES:], "answer"
        elif found is not None:
            self.waits_for = found.decode()

    def body_comes(self) -> None:
        """What it waited for is there."""
        assert self.waits_for == "body"
        self._go_on()

    def answered(self, answer: lane_pb.RenewResponse | bytes | None, *, status: str = "200") -> None:
        """A proxy answers what it asked: a message, or what stands for one."""
        assert self.waits_for == "answer"
        body = grpc_frame(answer.SerializeToString()) if isinstance(answer, lane_pb.RenewResponse) else answer
        self._go_on(self._gateway.lua.table_from({b":status": status.encode()}), body)

    @property
    def asked(self) -> lane_pb.RenewRequest:
        """What it waits for an answer to."""
        assert self.waits_for == "answer", "it is not time to ask"
        return lane_pb.RenewRequest.FromString(self._asked)

    @property
    def headers(self) -> dict[str, str]:
        """What it has now."""
        return {name.decode(): value.decode(errors="replace") for name, value in self._request[b"headers"].items()}

    @property
    def is_picked(self) -> bool:
        """Whether it has an endpoint; who has none has nothing that belongs to one."""
        assert not self.waits_for
        headers = self.headers
        assert LANE_HEADER not in headers
        if ENDPOINT_HEADER in headers:
            assert headers[MAX_RETRIES_HEADER] == str(headers[ENDPOINT_HEADER].count(","))
            return True
        assert not {ROUTE_REVISION_HEADER, MAX_RETRIES_HEADER, COHORT_HEADER} & headers.keys()
        return False

    @property
    def endpoints(self) -> list[str]:
        """Where it goes, first choice first; none where a proxy is to be asked."""
        return self.headers[ENDPOINT_HEADER].split(",") if self.is_picked else []

    @property
    def errors(self) -> list[str]:
        """What it had logged."""
        return [text.decode(errors="replace") for text in self._request[b"errors"].values()]


class Gateway:
    """An Envoy, as far as the filter sees one."""

    def __init__(self, *, jit: bool = True) -> None:
        self.lua = luajit.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        if not jit:
            self.lua.execute(b"jit.off()")
        self.lua.execute(_ENVOY)
        self.lua.execute(script())
        self._nanoseconds = 0
        self._request_count = 0
        self.sleep(1000.0)

    @property
    def memory_bytes(self) -> int:
        """What Lua has, less garbage."""
        collected: float = self.lua.eval(b"collectgarbage('collect') + collectgarbage('count')")
        return round(collected * 1024)

    @property
    def now_seconds(self) -> float:
        """The clock."""
        return self._nanoseconds / 1e9

    def sleep(self, seconds: float) -> None:
        """Time goes by."""
        self._nanoseconds += round(seconds * 1e9)
        self.lua.globals()[b"set_clock"](*divmod(self._nanoseconds, 1_000_000_000))

    def begin(self, body: bytes | None = None, *, model: str = MODEL, **headers: str) -> Request:
        """A request comes, and its body with it; ``headers`` are its own, ``body`` is JSON."""
        self._request_count += 1
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        usual = {LANE_HEADER: model, REQUEST_ID_HEADER: f"id-{self._request_count}"}
        request = Request(self, None if body is None else framed(body), usual | named, lifted_from(body or b""))
        if request.waits_for == "body":
            request.body_comes()
        return request

    def send(self, body: bytes | None = None, **more: Any) -> Request:
        """A request that does not ask, and is done."""
        request = self.begin(body if body is not None else chat(), **more)
        assert not request.waits_for
        return request

    def carry(self, body: bytes, said: lane_pb.RenewResponse) -> lane_pb.RenewRequest:
        """A request that is answered so if it asks; returns what it told."""
        request = self.begin(body)
        if not request.waits_for:
            return lane_pb.RenewRequest()
        asked = request.asked
        request.answered(said)
        return asked

    def renew(
        self, answer: lane_pb.RenewResponse | bytes | None, body: bytes | None = None, **more: Any
    ) -> lane_pb.RenewRequest:
        """A request asks, and is answered so; returns what it asked. The clock goes on to when it asks."""
        return self.renewed(answer, body, **more)[0]

    def renewed(
        self, answer: lane_pb.RenewResponse | bytes | None, body: bytes | None = None, **more: Any
    ) -> tuple[lane_pb.RenewRequest, Request]:
        """The same, with the request."""
        request = self.begin(body if body is not None else chat(), **more)
        asked = request.asked
        request.answered(answer)
        assert not request.waits_for
        return asked, request

    def told(self, answer: lane_pb.RenewResponse) -> lane_pb.RenewRequest:
        """What a gateway tells when it asks the next time."""
        self.sleep(RENEW_SECONDS)
        return self.renew(answer)
