"""One launcher of vLLM for all tests of replicas: importing takes ten seconds, forking two hundredths of one."""

from collections.abc import Iterator

import pytest

from tests.worker.replica.support import Launcher, Leaves


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """A launcher of vLLM."""
    launcher = Launcher("vllm")
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def leaves(tmp_path_factory: pytest.TempPathFactory) -> Leaves:
    """Certificates of every component."""
    return Leaves.issue(tmp_path_factory.mktemp("pki"))
