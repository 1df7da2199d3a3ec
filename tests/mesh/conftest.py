"""A CA and leaves for tests of the mesh library."""

from pathlib import Path

import pytest

from helios.mesh.identity import CertificateAuthority


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    """A fresh CA in the test's directory."""
    return CertificateAuthority.open(tmp_path / "pki")
