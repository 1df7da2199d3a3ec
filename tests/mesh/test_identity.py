"""Leaves: who they name, when they are due, and that no reader sees half a renewal."""

import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from helios.mesh.errors import InvalidRequest
from helios.mesh.identity import CertificateAuthority, SpiffeId, renewal_due


def test_spiffe_ids_round_trip() -> None:
    text = "spiffe://helios.local/ns/default/sa/worker"
    assert str(SpiffeId.parse(text)) == text
    assert SpiffeId.parse(text).component == "worker"


@pytest.mark.parametrize(
    "text",
    ["", "worker", "https://helios.local/ns/default/sa/worker", "spiffe://d/sa/worker", "spiffe://d/ns//sa/worker",
     "spiffe://d/ns/default/sa/worker/more"],
)  # fmt: skip
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        SpiffeId.parse(text)


def test_a_leaf_names_its_component_and_verifies_against_the_ca(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    files = authority.issue("worker", tmp_path / "worker")
    leaf = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == ["spiffe://helios.local/ns/default/sa/worker"]
    assert names.get_values_for_type(x509.DNSName) == ["worker.helios.internal"]
    leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(files.ca.read_bytes()))
    ssl.create_default_context(cafile=str(files.ca)).load_cert_chain(files.certificate, files.key)
    assert files.key.stat().st_mode & 0o777 == 0o600


def test_an_authority_is_made_once(tmp_path: Path) -> None:
    first = CertificateAuthority.open(tmp_path / "pki").issue("a", tmp_path / "a")
    second = CertificateAuthority.open(tmp_path / "pki").issue("b", tmp_path / "b")
    assert first.ca.read_bytes() == second.ca.read_bytes()


def test_a_leaf_is_due_after_a_third_of_its_life(authority: CertificateAuthority, tmp_path: Path) -> None:
    files = authority.issue("worker", tmp_path / "worker", lifetime=timedelta(hours=3))
    now = datetime.now(UTC)
    assert not renewal_due(files, now=now + timedelta(minutes=50))
    assert renewal_due(files, now=now + timedelta(minutes=70))


def test_a_leaf_of_a_clock_that_was_ahead_is_due(authority: CertificateAuthority, tmp_path: Path) -> None:
    files = authority.issue("worker", tmp_path / "worker")
    assert renewal_due(files, now=datetime.now(UTC) - timedelta(days=2))


def test_a_missing_leaf_is_due(authority: CertificateAuthority, tmp_path: Path) -> None:
    files = authority.issue("worker", tmp_path / "worker")
    files.certificate.unlink()
    assert renewal_due(files, now=datetime.now(UTC))


def test_no_reader_sees_key_and_certificate_of_different_generations(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    files = authority.issue("worker", tmp_path / "worker")
    stop = threading.Event()

    def renew() -> None:
        while not stop.is_set():
            authority.issue("worker", tmp_path / "worker")

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        for _ in range(200):
            identity = files.read()
            key = serialization.load_pem_private_key(identity.key, password=None)
            leaf = x509.load_pem_x509_certificate(identity.certificate)
            assert key.public_key() == leaf.public_key()
    finally:
        stop.set()
        renewing.join()
    assert len(list((tmp_path / "worker").glob("generation-*"))) <= 2
