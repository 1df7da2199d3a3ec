"""What REST reaches: annotations that are there, don't collide, and give a valid OpenAPI document."""

import re
from collections.abc import Iterator

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodDescriptorProto
from openapi_spec_validator import validate

from proto.openapi import openapi_document

# Every RPC is called over REST too, except these, with the reason.
NATIVE_ONLY = {
    "helios.api.fleet.v1.FleetService": "a session between processes",
    "helios.api.fleet.v1.ReplacementService": "from the relay to proxies",
    "helios.api.proxy.v1.FeedService": "between processes of a proxy",
    "helios.api.proxy.v1.LaneService": "Envoy asks it, on behalf of nobody",
    "helios.api.proxy.v1.PeerService": "a session between proxies",
    "helios.api.worker.v1.SupervisorService": "a session between processes",
    "helios.api.storage.v1.BlobService": "between storage agents",
    "helios.api.storage.v1.StorageService": "between processes of a node; operators evict through AdminService",
    "helios.api.inference.v1.InferenceService": "the typed twin of the OpenAI calls, for gRPC clients",
    "helios.api.inference.v1.ContinuationService": "from the relay to replicas",
    "helios.api.inference.v1.PrefillService": "between replicas",
    "helios.api.registry.v1.ChunkService": "for storage agents",
    "helios.api.registry.v1.SyncService.Session": "a session between processes",
    "helios.api.registry.v1.CordonService": "for proxies; operators cordon through AdminService",
    "helios.api.registry.v1.LeaseService.AcquireLease": "from proxies, which alone may",
    "helios.api.registry.v1.LeaseService.RenewLease": "from proxies, which alone may",
    "helios.api.registry.v1.LeaseService.ReleaseLease": "from proxies, which alone may",
    "helios.api.registry.v1.KeyService.WatchKeys": "a stream without end, for proxies",
    "helios.api.registry.v1.ArtifactService.PutArtifact": "from workers, which alone may",
    "helios.api.registry.v1.ProfileService.ExchangeMeasures": "between proxies and the registry",
    "helios.api.registry.v1.UsageService.ReportUsage": "from proxies, which alone may",
    "helios.api.registry.v1.UsageService.WatchWarmTargets": "a stream without end, for proxies",
    "helios.api.registry.v1.RegistryService.WatchModels": "a stream without end, for proxies",
}
PUBLIC = {"helios.api.catalog.v1.ModelService", "helios.api.inference.v1.OpenAIService"}


def rpcs(contracts: FileDescriptorSet) -> Iterator[tuple[str, MethodDescriptorProto]]:
    for file in contracts.file:
        for service in file.service:
            for method in service.method:
                yield f"{file.package}.{service.name}", method


def route(method: MethodDescriptorProto) -> str:
    rule = method.options.Extensions[annotations_pb2.http]
    verb = rule.WhichOneof("pattern") or ""
    return f"{verb} {getattr(rule, verb, '')}"


def is_annotated(method: MethodDescriptorProto) -> bool:
    return bool(method.options.HasExtension(annotations_pb2.http))


def test_every_rpc_has_an_http_annotation_or_a_reason(contracts: FileDescriptorSet) -> None:
    for service, method in rpcs(contracts):
        is_native = service in NATIVE_ONLY or f"{service}.{method.name}" in NATIVE_ONLY
        assert is_annotated(method) != is_native, f"{service}.{method.name}"


def test_admin_paths_and_public_paths_are_apart(contracts: FileDescriptorSet) -> None:
    """The two edges are told apart by service, and a person tells them apart by path: both must say the same."""
    for service, method in rpcs(contracts):
        if is_annotated(method):
            expected = r"\w+ /v1/" if service in PUBLIC else r"\w+ /admin/v1/"
            assert re.match(expected, route(method)), f"{service}.{method.name}: {route(method)}"


def test_no_two_rpcs_share_a_route(contracts: FileDescriptorSet) -> None:
    routes = [re.sub(r"\{[^}]*\}", "{}", route(method)) for _, method in rpcs(contracts) if is_annotated(method)]
    assert len(routes) == len(set(routes)), sorted(routes)


def test_openapi_document_is_valid_and_complete(contracts: FileDescriptorSet) -> None:
    document = openapi_document(contracts)
    validate(document)
    described = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    annotated = {f"{s.rpartition('.')[2]}_{method.name}" for s, method in rpcs(contracts) if is_annotated(method)}
    assert described == annotated
    scale = document["paths"]["/admin/v1/models/{model}:scale"]["post"]
    assert [parameter["name"] for parameter in scale["parameters"]] == ["model"]
    body = scale["requestBody"]["content"]["application/json"]["schema"]
    assert list(body["properties"]) == ["replica_count", "dry_run"]
    assert "text/event-stream" in document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    schemas = document["components"]["schemas"]
    # proto3 JSON: 64-bit integers are strings, enums are names.
    assert schemas["catalog.v1.ModelResources"]["properties"]["weights_bytes"]["type"] == "string"
    assert "MODEL_STATE_READY" in schemas["catalog.v1.ModelState"]["enum"]


def test_every_operation_of_the_openapi_document_is_described(contracts: FileDescriptorSet) -> None:
    document = openapi_document(contracts)
    for path in document["paths"].values():
        for operation in path.values():
            assert operation["description"], operation["operationId"]
            assert all(parameter["description"] for parameter in operation["parameters"]), operation["operationId"]
