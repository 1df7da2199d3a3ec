"""ArtifactService over the store of artifacts: validation, permissions, pages, streams."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from helios.api.registry.v1 import artifact_service_pb2 as pb
from helios.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceServicer
from helios.mesh.errors import InvalidRequest, PermissionDenied
from helios.registry import access
from helios.registry.artifact_wire import artifact_to_proto, header_from_proto
from helios.registry.artifacts import check_name
from helios.registry.manifest import parse_revision
from helios.registry.pages import bad_token, make_token, page_size, read_token
from helios.registry.uploads import Uploads


class ArtifactServicer(ArtifactServiceServicer):
    """Answers the contract. Errors are raised; the server's interceptor ends the call with them."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads

    async def GetArtifact(self, request: pb.GetArtifactRequest, context: Any) -> pb.GetArtifactResponse:
        """Finds an artifact by its name."""
        check_name(request.kind, request.key)
        if access.is_person(context):
            found = await self._uploads.store.get(request.kind, request.key)
        else:
            found = await self._uploads.use(request.kind, request.key, datetime.now(UTC))
        return pb.GetArtifactResponse(artifact=artifact_to_proto(found))

    async def ListArtifacts(self, request: pb.ListArtifactsRequest, context: Any) -> pb.ListArtifactsResponse:
        """Lists artifacts by kind and key."""
        del context
        size = page_size(request.page_size)
        kind, slash, key = read_token(request.page_token, "artifacts").partition("/")
        if request.page_token and not slash:
            raise bad_token()
        revision = parse_revision(request.revision) if request.revision else ""
        found = await self._uploads.store.list_page(revision=revision, after=(kind, key), limit=size + 1)
        page = found[:size]
        token = make_token("artifacts", f"{page[-1].kind}/{page[-1].key}") if len(found) > size else ""
        return pb.ListArtifactsResponse(artifacts=map(artifact_to_proto, page), next_page_token=token)

    async def PutArtifact(
        self, request_iterator: AsyncIterator[pb.PutArtifactRequest], context: Any
    ) -> pb.PutArtifactResponse:
        """Stores an artifact."""
        access.check_may_publish(context)
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "header":
            raise InvalidRequest("the first message is the header", reason="INVALID_ARTIFACT")
        stored, is_new = await self._uploads.put(header_from_proto(first.header), _data(request_iterator))
        return pb.PutArtifactResponse(artifact=artifact_to_proto(stored), is_new=is_new)

    async def DeleteArtifact(self, request: pb.DeleteArtifactRequest, context: Any) -> pb.DeleteArtifactResponse:
        """Removes an artifact. A worker says which one it means, so that it can't hit a better one that came since."""
        check_name(request.kind, request.key)
        if request.digest:
            parse_revision(request.digest)
        elif access.is_worker(context):
            raise PermissionDenied("a worker names the digest of what it deletes")
        freed_bytes = await self._uploads.delete(request.kind, request.key, digest=request.digest)
        return pb.DeleteArtifactResponse(freed_bytes=freed_bytes)


async def _data(requests: AsyncIterator[pb.PutArtifactRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("message") != "data":
            raise InvalidRequest("after the header come bytes", reason="INVALID_ARTIFACT")
        yield request.data
