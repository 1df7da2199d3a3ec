"""Servers that stand in for proxy, replica and registry behind a real Envoy: real gRPC, real mTLS, no logic.

A test says what they do (``picker.pick``, ``replica.name``) and reads what reached them (``calls``).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from envoy.service.ext_proc.v3 import external_processor_pb2, external_processor_pb2_grpc
from envoy.type.v3 import http_status_pb2
from google.api import httpbody_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from helios.api.inference.v1 import inference_service_pb2, inference_service_pb2_grpc, openai_service_pb2_grpc
from helios.api.proxy.v1 import lane_service_pb2 as lane_pb
from helios.api.proxy.v1.lane_service_pb2_grpc import LaneServiceServicer
from helios.mesh import errors
from helios.mesh.status import abort, openai_body, retry_after_header

EXT_PROC_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"


@dataclass(frozen=True)
class Call:
    """One call that reached a fake."""

    method: str
    metadata: dict[str, str]
    request: Any


@dataclass
class FakeReplica(openai_service_pb2_grpc.OpenAIServiceServicer, inference_service_pb2_grpc.InferenceServiceServicer):
    """A replica: echoes what it got, or streams events. The JSON body steers it.

    ``{"stream": true, "chunks": 3, "pause": 0.01}`` streams; ``{"fail": "NotFound"}`` raises that error; ``{"wait":
    1}`` answers later.
    """

    name: str = "replica"
    calls: list[Call] = field(default_factory=list)
    refusal: errors.HeliosError | None = None
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    peer_certificates: set[bytes] = field(default_factory=set)

    async def CreateChatCompletion(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Answers a conversation."""
        self.peer_certificates.update(context.auth_context().get("x509_pem_cert", ()))
        self.calls.append(_call("CreateChatCompletion", request, context))
        body = json.loads(request.data or b"{}")
        try:
            if self.refusal is not None:
                await abort(context, self.refusal)
            if "fail" in body:
                await abort(
                    context, getattr(errors, body["fail"])("as told", retry_after_seconds=body.get("retry_after"))
                )
            await asyncio.sleep(body.get("wait", 0))
            if body.get("stream"):
                for index in range(body.get("chunks", 3)):
                    yield _http_body("text/event-stream", b'data: {"index":%d}\n\n' % index)
                    await asyncio.sleep(body.get("pause", 0))
                yield _http_body("text/event-stream", b"data: [DONE]\n\n")
            else:
                yield _http_body("application/json", self._echo(request, context))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def CreateCompletion(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Continues a text."""
        self.calls.append(_call("CreateCompletion", request, context))
        yield _http_body("application/json", self._echo(request, context))

    async def CreateEmbedding(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Turns texts into vectors."""
        self.calls.append(_call("CreateEmbedding", request, context))
        yield _http_body("application/json", self._echo(request, context))

    async def Chat(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Typed stream: one finish without tokens."""
        self.calls.append(_call("Chat", request, context))
        yield inference_service_pb2.ChatResponse(finished=inference_service_pb2.Finished(model=request.model))

    async def Complete(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Typed stream: one finish without tokens."""
        self.calls.append(_call("Complete", request, context))
        yield inference_service_pb2.CompleteResponse(finished=inference_service_pb2.Finished(model=request.model))

    async def Tokenize(self, request: Any, context: Any) -> Any:
        """Typed and unary."""
        self.calls.append(_call("Tokenize", request, context))
        return inference_service_pb2.TokenizeResponse(token_ids=[1, 2, 3])

    def _echo(self, request: Any, context: Any) -> bytes:
        answer = {
            "object": "chat.completion",
            "replica": self.name,
            "size": len(request.data),
            "headers": _metadata(context),
        }
        return json.dumps(answer).encode()


def add_replica(replica: FakeReplica, server: grpc.aio.Server) -> None:
    """Adds both inference services to a server."""
    openai_service_pb2_grpc.add_OpenAIServiceServicer_to_server(replica, server)
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(replica, server)


@dataclass(frozen=True)
class PickRequest:
    """What the picker knows of a request."""

    headers: dict[str, str]
    model: str
    envoy_node: str
    lifted: dict[str, Any]
    """What Envoy read of the body."""


# An error rejects the request; a list of endpoints is tried in order.
Pick = Callable[[PickRequest], "list[str] | errors.HeliosError"]


@dataclass
class FakePicker(external_processor_pb2_grpc.ExternalProcessorServicer):
    """ext_proc: names fixed endpoints; asks for the body where no model is known."""

    endpoints: list[str] = field(default_factory=list)
    requests: list[PickRequest] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    pick: Pick | None = None
    hold: Callable[[PickRequest], Any] | None = None
    cluster: str = ""
    """Where there are several proxies: Envoy's cluster that this one's endpoints are in."""

    async def Process(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Answers one request."""
        node = _metadata(context).get("x-helios-envoy", "")
        async for message in request_iterator:
            if message.HasField("request_body"):
                self.bodies.append(message.request_body.body)
                response = external_processor_pb2.ProcessingResponse(request_body=external_processor_pb2.BodyResponse())
                yield in_cluster(response, response.request_body, self.cluster)
                return
            headers = {h.key: h.raw_value.decode() or h.value for h in message.request_headers.headers.headers}
            lifted = MessageToDict(message.metadata_context.filter_metadata["helios"])
            model = lifted.get("model", "")
            named = headers.get("x-helios-model") or (model if isinstance(model, str) else "")
            request = PickRequest(headers, named, node, lifted)
            self.requests.append(request)
            if self.hold is not None:
                await self.hold(request)
            choice = self.pick(request) if self.pick is not None else self.endpoints
            if isinstance(choice, errors.HeliosError):
                yield rejected(choice)
                return
            response = picked(choice, wants_body=not request.model)
            yield in_cluster(response, response.request_headers, self.cluster)
            if request.model:
                return


@dataclass
class FakeCheck(external_auth_pb2_grpc.AuthorizationServicer):
    """ext_authz: names fixed endpoints at once; none: it says nothing, and the picker is asked."""

    endpoints: list[str] = field(default_factory=list)
    cluster: str = ""
    """As `FakePicker` has it."""
    requests: list[Any] = field(default_factory=list)

    async def Check(self, request: Any, context: Any) -> Any:
        """Answers one request."""
        self.requests.append(request)
        response = external_auth_pb2.CheckResponse()
        response.ok_response.SetInParent()
        if self.endpoints:
            headers = {"x-helios-endpoint": ",".join(self.endpoints), "x-helios-cluster": self.cluster}
            for key, value in headers.items():
                option = response.ok_response.headers.add()
                option.header.key, option.header.value = key, value
        return response


@dataclass
class FakeLane(LaneServiceServicer):
    """Says how the gateway is to pick by itself; nothing said: that it may not."""

    answer: lane_pb.RenewResponse = field(default_factory=lane_pb.RenewResponse)
    requests: list[lane_pb.RenewRequest] = field(default_factory=list)
    hold: Callable[[lane_pb.RenewRequest], Any] | None = None

    async def Renew(self, request: Any, context: Any) -> Any:
        """Answers one request."""
        self.requests.append(request)
        if self.hold is not None:
            await self.hold(request)
        return self.answer


def picked(endpoints: Iterable[str], *, wants_body: bool = False) -> Any:
    """Returns the answer that names endpoints, in order."""
    names = list(endpoints)
    response = external_processor_pb2.ProcessingResponse()
    mutation = response.request_headers.response.header_mutation
    for key, value in (("x-helios-endpoint", ",".join(names)), ("x-envoy-max-retries", str(max(0, len(names) - 1)))):
        option = mutation.set_headers.add(append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD)
        option.header.key, option.header.raw_value = key, value.encode()
    if wants_body:
        response.mode_override.request_body_mode = processing_mode_pb2.ProcessingMode.BUFFERED
    return response


def in_cluster(response: Any, part: Any, cluster: str) -> Any:
    """Returns the answer, with the cluster that its endpoints are in, where there is more than one."""
    if cluster:
        part.response.clear_route_cache = True
        option = part.response.header_mutation.set_headers.add()
        option.header.key, option.header.raw_value = "x-helios-cluster", cluster.encode()
    return response


def rejected(error: errors.HeliosError) -> Any:
    """Returns the answer that refuses a request."""
    response = external_processor_pb2.ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = http_status_pb2.StatusCode.Value(http_status_pb2.StatusCode.Name(error.http_status))
    immediate.grpc_status.status = grpc.StatusCode[error.grpc_code].value[0]
    immediate.body = error.message.encode()
    headers = {"x-openai-error": openai_body(error).decode(), "retry-after": retry_after_header(error)}
    for key, value in headers.items():
        if value is not None:
            option = immediate.headers.set_headers.add()
            option.header.key, option.header.raw_value = key, value.encode()
    return response


@dataclass
class Recorder:
    """Serves any service of the contracts: each method records its call and answers with its response, empty or as
    told.
    """

    calls: list[Call] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, errors.HeliosError] = field(default_factory=dict)

    def add(self, module: Any, service: str, server: grpc.aio.Server) -> None:
        """Serves ``service`` (its simple name) of a ``_pb2`` module."""
        descriptor = module.DESCRIPTOR.services_by_name[service]
        handlers = {method.name: self._handler(method) for method in descriptor.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(descriptor.full_name, handlers),))

    def _handler(self, method: Any) -> Any:
        async def unary(request: Message, context: Any) -> Any:
            self.calls.append(_call(method.name, request, context))
            if method.name in self.failures:
                await abort(context, self.failures[method.name])
            return self.answers.get(method.name) or _class(method.output_type)()

        async def stream(request: Message, context: Any) -> AsyncIterator[Any]:
            self.calls.append(_call(method.name, request, context))
            for answer in self.answers.get(method.name, []):
                yield answer
            if method.name in self.failures:
                await abort(context, self.failures[method.name])

        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        return make(
            stream if method.server_streaming else unary,
            request_deserializer=_class(method.input_type).FromString,
            response_serializer=_class(method.output_type).SerializeToString,
        )


def _class(descriptor: Any) -> Any:
    return descriptor._concrete_class


def _http_body(content_type: str, data: bytes) -> Any:
    return httpbody_pb2.HttpBody(content_type=content_type, data=data)


def _metadata(context: Any) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}


def _call(method: str, request: Any, context: Any) -> Call:
    return Call(method, _metadata(context), request)
