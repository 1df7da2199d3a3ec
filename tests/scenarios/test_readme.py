"""Every command and every example in the README runs, with only addresses and the state directory replaced."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.scenarios.running_mesh import BIN, RunningMesh

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# `make test` is what runs this test.
BLOCKS = [
    pytest.param(language, code, id=f"{number}-{language}")
    for number, (language, code) in enumerate(re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    if language != "text" and not code.startswith("make ")
]


def here(mesh: RunningMesh, code: str) -> str:
    return code.replace("127.0.0.1:8080", mesh.edge).replace("127.0.0.1:8081", mesh.admin)


def run(mesh: RunningMesh, command: list[str], folder: Path = ROOT) -> str:
    path = f"{BIN}:{os.environ['PATH']}"  # noqa: TID251 - node may be in .venv
    environment = {**dict(os.environ), "HELIOS_STATE_DIR": str(mesh.state), "PATH": path}  # noqa: TID251
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=False, cwd=folder, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_an_example_runs(mesh: RunningMesh, smollm2_directory: Path, language: str, code: str, tmp_path: Path) -> None:
    assert smollm2_directory == ROOT / "build" / "models" / "smollm2-135m-instruct"
    code = here(mesh, code)
    if language == "sh":
        output = run(mesh, ["bash", "-euo", "pipefail", "-c", code])
    elif language == "python":
        output = run(mesh, [str(BIN / "python"), "-c", code])
    else:
        assert language == "js"
        # Beside node_modules, where node looks for packages.
        script = ROOT / "tests" / "scenarios" / "node" / f"readme-{os.getpid()}.mjs"
        script.write_text(code)
        try:
            output = run(mesh, ["node", str(script)])
        finally:
            script.unlink()
    if "capital of France" in code:
        assert "Paris" in re.sub(r'"\s*}\s*}\s*{.*?"text": "', "", output, flags=re.DOTALL)


def test_the_readme_has_the_two_commands_and_the_examples() -> None:
    assert "```sh\nmake up\n```" in README
    assert "```sh\nmake test\n```" in README
    assert {block.values[0] for block in BLOCKS} == {"sh", "python", "js"}


def test_make_up_runs_with_arguments(tmp_path: Path) -> None:
    other = RunningMesh(tmp_path / "state")
    arguments = f"--detach --model '' --state-dir {other.state} --port {other.port} --admin-port {other.admin_port}"
    command = ["make", "--no-print-directory", "up", f"ARGS={arguments}"]
    started = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        assert f"http://{other.edge}/v1" in started.stdout
    finally:
        assert other.helios("down").returncode == 0
