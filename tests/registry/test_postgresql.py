"""The PostgreSQL of the tests ends with them, however they end."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RUN = """
from tests.registry.postgresql import postgresql
with postgresql() as server, server.running() as pid:
    print(pid, server.directory, flush=True)
    input()
"""


def test_a_killed_run_takes_its_server_along() -> None:
    tests = subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert tests.stdout is not None
    assert tests.stdin is not None
    try:
        pid, directory = tests.stdout.readline().split()
        server = psutil.Process(int(pid))
        family = [server, *server.children(recursive=True)]
        assert len(family) > 1
    finally:
        tests.kill()
        tests.wait()
        tests.stdin.close()
        tests.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    # What a killed process can't do.
    subprocess.run(["rm", "-r", directory], check=True)
