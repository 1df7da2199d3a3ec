"""mTLS of Envoy towards the mesh, by secrets in files.

Envoy reads its leaf by file SDS: the secret's ``watched_directory`` makes it load a renewed pair within
milliseconds, with no chicken-and-egg between the control plane and the certificate that reaches it. (A certificate
that stands in the cluster itself is never read again, and SDS over ADS in a static cluster crashes Envoy 1.40 at
boot.)
"""

import json
from pathlib import Path

from envoy_data_plane.envoy.config.core.v3 import (
    ApiVersion,
    ConfigSource,
    DataSource,
    PathConfigSource,
    TransportSocket,
    WatchedDirectory,
)
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
    CertificateValidationContext,
    CommonTlsContext,
    CommonTlsContextCombinedCertificateValidationContext,
    SdsSecretConfig,
    Secret,
    SubjectAltNameMatcher,
    SubjectAltNameMatcherSanType,
    TlsCertificate,
    TlsParameters,
    TlsParametersTlsProtocol,
    UpstreamTlsContext,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from helios.mesh.envoy import pack
from helios.mesh.envoy.settings import EdgeSettings
from helios.mesh.identity import IdentityFiles, SpiffeId, server_name


def secret_files(directory: Path, identity: IdentityFiles) -> dict[Path, str]:
    """Returns the SDS files of a leaf: one for the pair, one for the authorities, since a file holds one secret."""
    watched = WatchedDirectory(path=pack.absolute(identity.directory))
    leaf = TlsCertificate(
        certificate_chain=DataSource(filename=pack.absolute(identity.certificate)),
        private_key=DataSource(filename=pack.absolute(identity.key)),
        watched_directory=watched,
    )
    authorities = CertificateValidationContext(
        trusted_ca=DataSource(filename=pack.absolute(identity.ca)), watched_directory=watched
    )
    return {
        _secret_path(directory, identity, "leaf"): _discovery(Secret(name="leaf", tls_certificate=leaf)),
        _secret_path(directory, identity, "ca"): _discovery(Secret(name="ca", validation_context=authorities)),
    }


def upstream_tls(settings: EdgeSettings, identity: IdentityFiles, peer: str) -> TransportSocket:
    """Returns the transport socket that shows ``identity`` and accepts the component ``peer`` only."""
    spiffe_id = SpiffeId(settings.trust_domain, settings.namespace, peer)
    is_peer = SubjectAltNameMatcher(
        san_type=SubjectAltNameMatcherSanType.URI, matcher=StringMatcher(exact=str(spiffe_id))
    )
    tls13 = TlsParametersTlsProtocol.TLSv1_3
    common = CommonTlsContext(
        # Both ends: as a client Envoy's default maximum is TLS 1.2.
        tls_params=TlsParameters(tls_minimum_protocol_version=tls13, tls_maximum_protocol_version=tls13),
        tls_certificate_sds_secret_configs=[_secret_config(settings.directory, identity, "leaf")],
        combined_validation_context=CommonTlsContextCombinedCertificateValidationContext(
            default_validation_context=CertificateValidationContext(match_typed_subject_alt_names=[is_peer]),
            validation_context_sds_secret_config=_secret_config(settings.directory, identity, "ca"),
        ),
        alpn_protocols=["h2"],
    )
    context = UpstreamTlsContext(common_tls_context=common, sni=server_name(peer))
    return TransportSocket(name="envoy.transport_sockets.tls", typed_config=Any.pack(context))


def _secret_config(directory: Path, identity: IdentityFiles, kind: str) -> SdsSecretConfig:
    path = pack.absolute(_secret_path(directory, identity, kind))
    source = ConfigSource(path_config_source=PathConfigSource(path=path), resource_api_version=ApiVersion.V3)
    return SdsSecretConfig(name=kind, sds_config=source)


def _secret_path(directory: Path, identity: IdentityFiles, kind: str) -> Path:
    return directory / f"sds-{identity.directory.name}-{kind}.json"


def _discovery(secret: Secret) -> str:
    return json.dumps({"resources": [Any.pack(secret).to_dict()]}, indent=1)
