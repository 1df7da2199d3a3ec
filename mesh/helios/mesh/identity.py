"""Who a process is: SPIFFE ids, a private CA for one machine, short-lived leaves and their rotation.

On one machine ``helios up`` opens a CertificateAuthority in its state directory and writes a leaf for every component
before any process starts. Leaves live for a day and are renewed at a third of their life, so they outlive an outage of
the supervisor by hours. A leaf directory holds ``tls.crt``, ``tls.key`` and ``ca.crt``, the layout of a Kubernetes TLS
secret.

A renewal must never be seen half done by readers that load two files: the pair is written to a new directory and a
symbolic link ``current`` is swapped with one rename; the three names are links through it. Envoy watches the directory
for just that.
"""

import os
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from helios.mesh.errors import InvalidRequest
from helios.mesh.files import write_private

DEFAULT_TRUST_DOMAIN: Final = "helios.local"
DEFAULT_NAMESPACE: Final = "default"
# A day: long enough to outlive an outage of the supervisor over night, short enough to need no revocation.
LEAF_LIFETIME: Final = timedelta(days=1)
CA_LIFETIME: Final = timedelta(days=3650)
# Clocks of nodes differ by seconds; minutes are generous.
_BACKDATE: Final = timedelta(minutes=5)
_FILES: Final = ("tls.crt", "tls.key", "ca.crt")


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """``spiffe://<trust domain>/ns/<namespace>/sa/<component>``.

    Source: the form that Istio gives workloads, so that policies read the same on one machine and in a cluster.
    """

    trust_domain: str
    namespace: str
    component: str

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Reads an id. Raises InvalidRequest where it has another form."""
        scheme, _, rest = uri.partition("://")
        parts = rest.split("/")
        if scheme != "spiffe" or len(parts) != 5 or parts[1] != "ns" or parts[3] != "sa" or not all(parts):
            raise InvalidRequest(
                "not a SPIFFE id of the form spiffe://<domain>/ns/<ns>/sa/<name>", metadata={"id": uri}
            )
        return cls(parts[0], parts[2], parts[4])

    def __str__(self) -> str:
        """Returns the URI."""
        return f"spiffe://{self.trust_domain}/ns/{self.namespace}/sa/{self.component}"


def server_name(component: str) -> str:
    """Returns the DNS name in a component's leaf, which clients demand whatever address they dial."""
    return f"{component}.helios.internal"


@dataclass(frozen=True, slots=True)
class IdentityFiles:
    """The leaf of one component on disk."""

    directory: Path

    @property
    def certificate(self) -> Path:
        """PEM chain of the leaf."""
        return self.directory / "tls.crt"

    @property
    def key(self) -> Path:
        """PEM private key of the leaf, mode 0600."""
        return self.directory / "tls.key"

    @property
    def ca(self) -> Path:
        """PEM bundle of the authorities to trust."""
        return self.directory / "ca.crt"

    def spiffe_id(self) -> SpiffeId:
        """Returns who the leaf says its process is. Raises InvalidRequest where it can't be read, or does not say."""
        try:
            leaf = x509.load_pem_x509_certificate(self.certificate.read_bytes())
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (OSError, ValueError, x509.ExtensionNotFound) as error:
            raise InvalidRequest(
                f"{self.certificate}: no certificate with a SPIFFE id ({error})",
                metadata={"path": str(self.certificate)},
            ) from error
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        return SpiffeId.parse(next(iter(uris), ""))

    def read(self) -> "Identity":
        """Reads key, certificate and CA of one generation, even while they are being renewed."""
        for _ in range(10):
            before = os.path.realpath(self.certificate)
            identity = Identity(self.key.read_bytes(), self.certificate.read_bytes(), self.ca.read_bytes())
            if os.path.realpath(self.certificate) == before:
                return identity
        raise OSError(f"the certificate in {self.directory} keeps changing")


@dataclass(frozen=True, slots=True)
class Identity:
    """PEM bytes of one generation of a leaf."""

    key: bytes
    certificate: bytes
    ca: bytes


class CertificateAuthority:
    """A private CA for one machine; its key never leaves the directory (mode 0600)."""

    def __init__(
        self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, trust_domain: str, namespace: str
    ) -> None:
        self._certificate = certificate
        self._key = key
        self._trust_domain = trust_domain
        self._namespace = namespace

    @classmethod
    def open(
        cls, directory: Path, *, trust_domain: str = DEFAULT_TRUST_DOMAIN, namespace: str = DEFAULT_NAMESPACE
    ) -> Self:
        """Loads the CA of a directory; makes one on first use, and where the one that is there is not valid now."""
        certificate_path, key_path = directory / "ca.crt", directory / "ca.key"
        if not (key_path.exists() and _is_valid(certificate_path)):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            certificate, key = _make_ca(trust_domain)
            write_private(key_path, _key_pem(key))
            write_private(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
        loaded_key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        if not isinstance(loaded_key, ec.EllipticCurvePrivateKey):
            raise InvalidRequest(f"{key_path} is not an EC key; remove {directory} to make a new CA")
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        return cls(certificate, loaded_key, trust_domain, namespace)

    @property
    def pem(self) -> bytes:
        """What those who trust this CA are given."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, component: str, directory: Path, *, lifetime: timedelta = LEAF_LIFETIME) -> IdentityFiles:
        """Writes a fresh leaf for a component; readers see the old pair or the new one, never a mixture."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign_leaf(component, key, lifetime)
        generation = directory / f"generation-{secrets.token_hex(6)}"
        generation.mkdir(parents=True, mode=0o700)
        write_private(generation / "tls.key", _key_pem(key))
        write_private(generation / "tls.crt", certificate.public_bytes(serialization.Encoding.PEM) + self.pem)
        write_private(generation / "ca.crt", self.pem)
        _publish(directory, generation)
        return IdentityFiles(directory)

    def _sign_leaf(self, component: str, key: ec.EllipticCurvePrivateKey, lifetime: timedelta) -> x509.Certificate:
        now = datetime.now(UTC)
        spiffe_id = SpiffeId(self._trust_domain, self._namespace, component)
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(str(spiffe_id)),
            x509.DNSName(server_name(component)),
        ]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, server_name(component))]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATE)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def renewal_due(identity: IdentityFiles, *, now: datetime, renew_at_ratio: float = 1 / 3) -> bool:
    """Returns whether a leaf has lived for ``renew_at_ratio`` of its life, is not valid yet, or can't be read.

    Not valid yet: the clock was ahead when it was issued and has been set right since.
    """
    try:
        certificate = x509.load_pem_x509_certificate(identity.certificate.read_bytes())
    except (OSError, ValueError):
        return True
    born, dies = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return not born <= now < born + (dies - born) * renew_at_ratio


def _is_valid(path: Path) -> bool:
    """Returns whether a certificate is there and within its time, which one of a clock that was ahead is not."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return certificate.not_valid_before_utc <= datetime.now(UTC) < certificate.not_valid_after_utc


def _make_ca(trust_domain: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Helios private CA of {trust_domain}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _publish(directory: Path, generation: Path) -> None:
    current = directory / "current"
    previous = directory / current.readlink() if current.is_symlink() else None
    fresh_link = directory / f".current-{secrets.token_hex(6)}"
    fresh_link.symlink_to(generation.name)
    fresh_link.replace(current)
    for name in _FILES:
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(Path("current", name))
    # The generation before the last stays for readers that are between two files.
    for old in directory.glob("generation-*"):
        if old not in (generation, previous):
            shutil.rmtree(old, ignore_errors=True)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
