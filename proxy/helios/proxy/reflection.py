"""Server reflection, v1 and v1alpha, answered from the committed descriptor set.

grpcio's own reflection lists what one server serves and answers everybody alike. Here one address (Envoy) stands for
services of several processes, and what a caller may see depends on the listener that it came through: the public one
shows public services, the admin one those and the admin services. Types that no visible service reaches are not shown.
"""

from collections.abc import AsyncIterator, Iterable
from importlib import resources
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2 as pb

from helios.mesh.server import NO_TLS_COMPONENT, peer_component

REFLECTION_SERVICES: Final = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
PUBLIC_SERVICES: Final = frozenset(
    {
        "helios.api.inference.v1.OpenAIService",
        "helios.api.inference.v1.InferenceService",
        "helios.api.catalog.v1.ModelService",
        "grpc.health.v1.Health",
        *REFLECTION_SERVICES,
    }
)
ADMIN_SERVICES: Final = PUBLIC_SERVICES | {
    "helios.api.admin.v1.AdminService",
    "helios.api.registry.v1.RegistryService",
}
_VISIBLE: Final = {"edge": PUBLIC_SERVICES, "admin-edge": ADMIN_SERVICES, NO_TLS_COMPONENT: PUBLIC_SERVICES}


class Catalog:
    """The files that a set of services needs: theirs and all that they import."""

    def __init__(self, files: dict[str, descriptor_pb2.FileDescriptorProto], services: Iterable[str]) -> None:
        self.services = sorted(services)
        self._files: dict[str, bytes] = {}
        self._imports: dict[str, tuple[str, ...]] = {}
        self._symbols: dict[str, str] = {}
        wanted = set(self.services)
        for name, file in files.items():
            if any(f"{file.package}.{service.name}" in wanted for service in file.service):
                self._add(name, files, wanted)

    def by_name(self, name: str) -> list[bytes] | None:
        """A file and its imports, itself first; None where it is not visible."""
        if name not in self._files:
            return None
        found: dict[str, bytes] = {}
        todo = [name]
        while todo:
            current = todo.pop(0)
            if current not in found:
                found[current] = self._files[current]
                todo += self._imports[current]
        return list(found.values())

    def by_symbol(self, symbol: str) -> list[bytes] | None:
        """The file that defines a symbol, and its imports; None where it is not visible."""
        # A method's name is its service's plus a dot.
        file = self._symbols.get(symbol) or self._symbols.get(symbol.rpartition(".")[0])
        return self.by_name(file) if file is not None else None

    def _add(self, name: str, files: dict[str, descriptor_pb2.FileDescriptorProto], services: set[str]) -> None:
        if name in self._files:
            return
        shown = descriptor_pb2.FileDescriptorProto()
        shown.CopyFrom(files[name])
        for index in reversed(range(len(shown.service))):
            if f"{shown.package}.{shown.service[index].name}" not in services:
                del shown.service[index]
        self._files[name] = shown.SerializeToString()
        self._imports[name] = tuple(shown.dependency)
        self._index(shown.package, shown.message_type, name)
        names = [enum.name for enum in shown.enum_type] + [service.name for service in shown.service]
        for named in names:
            self._symbols[f"{shown.package}.{named}"] = name
        for dependency in shown.dependency:
            self._add(dependency, files, services)

    def _index(self, prefix: str, messages: Iterable[descriptor_pb2.DescriptorProto], file: str) -> None:
        for message in messages:
            name = f"{prefix}.{message.name}"
            self._symbols[name] = file
            for enum in message.enum_type:
                self._symbols[f"{name}.{enum.name}"] = file
            self._index(name, message.nested_type, file)


def load_files() -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The committed descriptor set, with health and both reflections added."""
    raw = resources.files("helios.api").joinpath("descriptors.pb").read_bytes()
    files = {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(raw).file}
    for module in (health_pb2, pb):
        added = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(added)
        files.setdefault(added.name, added)
    later = _v1_of(files[pb.DESCRIPTOR.name])
    files.setdefault(later.name, later)
    return files


class ReflectionServicer:
    """Both versions of the service; they differ in their package only, so bytes are the same."""

    def __init__(self) -> None:
        files = load_files()
        self._catalogs = {services: Catalog(files, services) for services in (PUBLIC_SERVICES, ADMIN_SERVICES)}

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers both versions."""
        for service in REFLECTION_SERVICES:
            handler = grpc.stream_stream_rpc_method_handler(
                self.info,
                request_deserializer=pb.ServerReflectionRequest.FromString,
                response_serializer=pb.ServerReflectionResponse.SerializeToString,
            )
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler}),)
            )

    async def info(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Answers each question in turn."""
        visible = _VISIBLE.get(peer_component(context) or "")
        catalog = self._catalogs[visible or PUBLIC_SERVICES]
        async for request in requests:
            yield self._answer(request, catalog)

    def _answer(self, request: Any, catalog: Catalog) -> Any:
        response = pb.ServerReflectionResponse(valid_host=request.host, original_request=request)
        match request.WhichOneof("message_request"):
            case "list_services":
                for name in catalog.services:
                    response.list_services_response.service.add(name=name)
            case "file_by_filename":
                _put(response, catalog.by_name(request.file_by_filename), request.file_by_filename)
            case "file_containing_symbol":
                _put(response, catalog.by_symbol(request.file_containing_symbol), request.file_containing_symbol)
            case _:
                # Extensions are proto2's; these contracts are proto3.
                _put(response, None, "extension")
        return response


def _put(response: Any, files: list[bytes] | None, what: str) -> None:
    if files is None:
        response.error_response.error_code = grpc.StatusCode.NOT_FOUND.value[0]
        response.error_response.error_message = f"not found: {what}"
    else:
        response.file_descriptor_response.file_descriptor_proto.extend(files)


def _v1_of(alpha: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """The v1 file of reflection, from v1alpha's: the same messages in another package.

    Source: https://github.com/grpc/grpc/blob/master/doc/server-reflection.md
    """
    raw = alpha.SerializeToString()
    later = descriptor_pb2.FileDescriptorProto.FromString(raw)
    later.name, later.package = "grpc/reflection/v1/reflection.proto", "grpc.reflection.v1"
    for message in later.message_type:
        for field in message.field:
            field.type_name = field.type_name.replace(".grpc.reflection.v1alpha.", ".grpc.reflection.v1.")
    for method in later.service[0].method:
        method.input_type = method.input_type.replace("v1alpha", "v1")
        method.output_type = method.output_type.replace("v1alpha", "v1")
    return later
