"""The TLS side of the server: mTLS that follows renewals of leaf and CA without a restart.

A context can't be told of new authorities to forget old ones, so each generation of files gets a context of its own,
and every handshake is moved to the newest one before the certificate is chosen (the hook for server names runs at each
ClientHello, with or without a name).
"""

import os
import ssl
from typing import Any, Final

import structlog

from helios.mesh.identity import IdentityFiles

log = structlog.get_logger()

_READ_ATTEMPTS: Final = 10
AuthContext = dict[str, list[bytes]]


class ServerTls:
    """Holds the context for new handshakes; connections that stand keep theirs."""

    def __init__(self, identity: IdentityFiles) -> None:
        """Raises OSError where the files can't be read or hold no certificate."""
        self._identity = identity
        self._generation, self._current = self._load()
        self.context = self._current

    def _follow(self, connection: ssl.SSLObject, _: Any, __: Any) -> None:
        try:
            if os.path.realpath(self._identity.certificate) != self._generation:
                self._generation, self._current = self._load()
        except OSError as error:
            # The leaf in force is good for hours; the next handshake looks again.
            log.warning("certificate can't be read", directory=str(self._identity.directory), error=str(error))
        connection.context = self._current

    def _load(self) -> tuple[str, ssl.SSLContext]:
        for _ in range(_READ_ATTEMPTS):
            before = os.path.realpath(self._identity.certificate)
            try:
                context = self._make()
            except OSError:
                if os.path.realpath(self._identity.certificate) == before:
                    raise
                continue
            # Key and certificate are two files; only when nothing was swapped meanwhile are they one generation.
            if os.path.realpath(self._identity.certificate) == before:
                return before, context
        raise OSError(f"the certificate in {self._identity.directory} keeps changing")

    def _make(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        # Sessions are not resumed: that would let a caller in without a look at its certificate.
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.num_tickets = 0
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(self._identity.certificate, self._identity.key)
        context.load_verify_locations(cafile=self._identity.ca)
        context.sni_callback = self._follow
        return context


def auth_context(connection: ssl.SSLObject | None) -> AuthContext:
    """Returns what grpc.aio's ``auth_context()`` says of the peer's certificate; empty without TLS."""
    if connection is None:
        return {}
    certificate: Any = connection.getpeercert() or {}
    # Never None: nobody gets this far without a certificate.
    encoded = connection.getpeercert(binary_form=True) or b""
    return {
        "transport_security_type": [b"ssl"],
        "x509_pem_cert": [ssl.DER_cert_to_PEM_cert(encoded).encode()],
        "x509_subject_alternative_name": [value.encode() for _, value in certificate.get("subjectAltName", ())],
    }
