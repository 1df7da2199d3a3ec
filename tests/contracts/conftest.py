"""The contracts, compiled once with their comments."""

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from proto.generate import GOOGLEAPIS, ROOT, lay_out_googleapis
from proto.openapi import build_descriptors


@pytest.fixture(scope="session")
def googleapis() -> None:
    """Lays out what buf.yaml imports from build/googleapis."""
    lay_out_googleapis(ROOT / "proto", GOOGLEAPIS)


@pytest.fixture(scope="session")
def contracts(googleapis: None) -> FileDescriptorSet:
    return build_descriptors()
