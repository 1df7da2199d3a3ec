"""A model in an OCI registry, by CNCF ModelPack: a manifest whose layers are the files, each named by its sha256.

Layers that are the files as they are (``.raw``), which is how Helios itself writes them, keep their sha256 from
registry to registry, so one that is known is not fetched again. A layer that is an archive (``.tar``, ``.tar+gzip``,
``.tar+zstd``) has another sha256 than the files in it, so it is fetched to be seen, and unpacked; what becomes of it is
remembered by the manifest, and the files in it are blobs by their own sha256.

Source: https://github.com/modelpack/model-spec v0.0.7; OCI distribution-spec 1.1.
"""

import hashlib
import json
import re
from typing import Any, Final

from helios.mesh.errors import HeliosError, InvalidRequest, NotFound, PermissionDenied, PreconditionFailed
from helios.mesh.transfer.http import HttpSource
from helios.mesh.transfer.source import RangeSource
from helios.registry.sources.oci_login import OciLogin, said
from helios.registry.sources.reference import OciReference
from helios.registry.sources.remote import Listing, RemoteFile, changed, mismatch
from helios.registry.sources.settings import OciSettings
from helios.registry.sources.unpack import PACKINGS
from helios.registry.sources.web import Refused, Web
from helios.registry.strict_json import malformed

_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_MODEL_TYPES: Final = frozenset(
    {"application/vnd.cncf.model.manifest.v1+json", "application/vnd.cncf.model.config.v1+json"}
)
_LAYER: Final = re.compile(r"application/vnd\.cncf\.model\.[a-z.]+\.v1\.(raw|tar(?:\+[a-z]+)?)")
# ModelPack's own name of a file, and OCI's, which older tools wrote.
_PATHS: Final = ("org.cncf.model.filepath", "org.opencontainers.image.title")
_MAX_MANIFEST_BYTES: Final = 4 << 20


class OciRepository:
    """A manifest of an OCI registry; ``remote.Repository``."""

    def __init__(self, reference: OciReference, web: Web, settings: OciSettings) -> None:
        self._reference = reference
        self._web = web
        self._login = OciLogin(reference, web, settings)
        self._base = self._login.base

    async def list_files(self) -> Listing:
        """Returns the files that the manifest names."""
        url = f"{self._base}/manifests/{self._reference.wanted}"
        try:
            answer = await self._login.request(
                "GET", url, headers={"accept": _MANIFEST}, limit_bytes=_MAX_MANIFEST_BYTES
            )
        except Refused as error:
            raise self.explain(error.status, said(error)) from error
        digest = f"sha256:{hashlib.sha256(answer.body).hexdigest()}"
        if self._reference.digest and digest != self._reference.digest:
            raise mismatch(str(self._reference), self._reference.digest, digest)
        files = tuple(self._file(*entry) for entry in read_layers(answer.document(), str(self._reference)))
        origin = OciReference(self._reference.host, self._reference.repository, digest=digest)
        return Listing(str(origin), files)

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Returns bytes of a layer."""
        try:
            await self._login.renew()
            is_whole = length == file.size_bytes
            content = await self._web.read(
                file.place, headers=self._login.headers(), offset=offset, length=length, is_whole=is_whole
            )
        except Refused as error:
            raise self.explain(error.status, said(error)) from error
        if len(content) != length:
            raise changed(file.path)
        return content

    def open(self, file: RemoteFile) -> RangeSource:
        """Returns a layer for reading by ranges."""
        return HttpSource(file.place, headers=self._login.fresh_headers)

    def explain(self, status: int, detail: str) -> HeliosError:
        """Returns the error of a refusal."""
        source, host = str(self._reference), self._reference.host
        metadata = {"param": "source", "status": str(status)}
        if status == 404:
            return NotFound(
                f"{host} has no {source}: check repository and tag", reason="SOURCE_NOT_FOUND", metadata=metadata
            )
        if status in {401, 403}:
            if not self._login.credentials:
                return PreconditionFailed(
                    f"{host} does not show {source} to everybody; give the registry a login, by docker login or"
                    f' HELIOS_REGISTRY__SOURCES__OCI__CREDENTIALS=\'{{"{host}": "USER:PASSWORD"}}\'',
                    reason="SOURCE_TOKEN_MISSING",
                    metadata=metadata,
                )
            return PermissionDenied(
                f"{host} refuses {source} to the registry's user; check name, password and rights",
                reason="SOURCE_ACCESS_DENIED",
                metadata=metadata,
            )
        said = f": {detail}" if detail else ""
        return InvalidRequest(
            f"{host} answered {status} for {source}{said}", reason="INVALID_SOURCE", metadata=metadata
        )

    def _file(self, path: str, digest: str, size_bytes: int, packing: str) -> RemoteFile:
        place, sha256 = f"{self._base}/blobs/{digest}", digest.removeprefix("sha256:")
        return RemoteFile(path, size_bytes, place, sha256=sha256, packing=packing)


def read_layers(manifest: Any, source: str) -> list[tuple[str, str, int, str]]:
    """Returns path, digest, size and packing of each layer of a model's manifest.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT, when it is no model.
    """
    if not isinstance(manifest, dict) or not isinstance(manifest.get("layers"), list):
        raise malformed(f"{source} is no manifest of one model")
    config = manifest.get("config")
    kinds = {manifest.get("artifactType"), config.get("mediaType") if isinstance(config, dict) else None}
    if not kinds & _MODEL_TYPES:
        raise malformed(f"{source} is not a model by CNCF ModelPack, but {_shown(kinds)}")
    return [_read_layer(layer, source) for layer in manifest["layers"]]


def _read_layer(layer: Any, source: str) -> tuple[str, str, int, str]:
    match layer:
        case {"mediaType": str(kind), "digest": str(digest), "size": int(size), "annotations": dict(annotations)}:
            found = _LAYER.fullmatch(kind)
            path = next((annotations[name] for name in _PATHS if isinstance(annotations.get(name), str)), "")
            if found is None or not path or not digest.startswith("sha256:"):
                raise malformed(f"{source} has a layer of type {kind[:100]!r} that is no file by CNCF ModelPack")
            packing = "" if found[1] == "raw" else found[1]
            if packing and packing not in PACKINGS:
                raise malformed(f"{source} packs {path[:100]} as {packing!r}, which nothing here unpacks")
            return path, digest, size, packing
    raise malformed(f"{source} has a layer that is no file by CNCF ModelPack: {json.dumps(layer)[:200]}")


def _shown(kinds: set[Any]) -> str:
    return ", ".join(sorted(kind[:100] for kind in kinds if isinstance(kind, str))) or "of no known type"
