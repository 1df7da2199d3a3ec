"""A whole mesh as the tests see it: started by the command that users type, found by what it wrote."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import psutil
from openai.types.chat import ChatCompletionMessageParam

from tests.ports import free_port

BIN = Path(sys.executable).parent
HELIOS = str(BIN / "helios")
GRPCURL = str(BIN / "grpcurl")
MODEL = "smollm2-135m-instruct"
ALIAS = "smollm2"
PROMPT = "What is the capital of France? Answer in one word."
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": PROMPT}]


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, whatever its status."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        found = self.json["error"]
        assert set(found) >= {"message", "type", "param", "code"}
        return dict(found)


class RunningMesh:
    """A mesh on a state directory of its own and ports of its own, beside whatever else runs on the machine."""

    def __init__(self, state: Path, settings: Iterable[str] = (), *, options: Iterable[str] = ()) -> None:
        self.state = state
        self.port, self.admin_port = free_port(), free_port()
        self._settings = tuple(settings)
        self._options = tuple(options)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def console(self) -> Path:
        """What ``helios up`` printed; beside the state directory, which takes no strangers' files."""
        return self.state.with_name(f"{self.state.name}-console.log")

    @property
    def edge(self) -> str:
        """``host:port`` of the public address."""
        return f"127.0.0.1:{self.port}"

    @property
    def admin(self) -> str:
        """``host:port`` of the admin address."""
        return f"127.0.0.1:{self.admin_port}"

    @property
    def token(self) -> str:
        """The admin token."""
        return (self.state / "admin-token").read_text().strip()

    def start(self, *, timeout_seconds: float = 240.0) -> None:
        """Runs ``helios up`` and returns when it says that it is ready."""
        command = [HELIOS, "up", "--state-dir", str(self.state), "--port", str(self.port)]
        command += ["--admin-port", str(self.admin_port), *(f"--set={setting}" for setting in self._settings)]
        command += self._options
        self.console.parent.mkdir(parents=True, exist_ok=True)
        with self.console.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.wait(lambda: self._has_state("ready"), timeout_seconds, "the mesh is ready")

    def stop(self, *, timeout_seconds: float = 120.0) -> int:
        """Sends SIGINT, as Ctrl-C does; returns the exit status, and prints what was said where it is not 0.

        What is left after the timeout, which is above the longest stop, is killed.
        """
        assert self._process is not None
        tree = [self._process.pid, *(child.pid for child in psutil.Process(self._process.pid).children(recursive=True))]
        self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(timeout_seconds)
        finally:
            if self._process.returncode != 0:
                print(self.console.read_text(errors="replace")[-8000:])
            for pid in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
            self._process.wait(5)

    def record(self) -> dict[str, Any]:
        """Returns mesh.json."""
        return dict(json.loads((self.state / "run" / "mesh.json").read_text()))

    def pid_of(self, name: str) -> int:
        """Returns the pid of a process of the mesh."""
        return next(int(child["pid"]) for child in self.record()["processes"] if child["name"] == name)

    def process(self, name: str) -> dict[str, Any]:
        """Returns the entry of a process in mesh.json."""
        return next(child for child in self.record()["processes"] if child["name"] == name)

    def wait(self, condition: Callable[[], bool], timeout_seconds: float, what: str) -> None:
        """Returns when ``condition`` holds; fails with the end of the console's log where it never does."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            is_dead = self._process is not None and self._process.poll() is not None
            if time.monotonic() > deadline or is_dead:
                console = self.console.read_text(errors="replace")[-4000:]
                raise AssertionError(f"not reached in {timeout_seconds} s: {what}\n{console}")
            time.sleep(0.05)

    def _has_state(self, state: str) -> bool:
        try:
            record = self.record()
        except (FileNotFoundError, ValueError):
            return False
        assert record["state"] != "failed", record["failure"]
        return self._process is not None and record["pid"] == self._process.pid and record["state"] == state

    def helios(self, *arguments: str, timeout_seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Runs a command of the CLI on this mesh."""
        environment = {**dict(os.environ), "HELIOS_STATE_DIR": str(self.state)}  # noqa: TID251 - a user's shell has both
        command = [HELIOS, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_seconds, check=False, env=environment
        )

    def request(
        self,
        path: str,
        body: bytes | None = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        is_admin: bool = False,
        timeout_seconds: float = 120.0,
    ) -> Answer:
        """Sends an HTTP request; with ``is_admin`` to the admin address, with its token."""
        base = self.admin if is_admin else self.edge
        sent = {"content-type": "application/json"} if body is not None else {}
        if is_admin:
            sent["authorization"] = f"Bearer {self.token}"
        sent |= headers or {}
        request = urllib.request.Request(f"http://{base}{path}", data=body, method=method, headers=sent)
        try:
            with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
                return _answer(response)
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def chat(self, **fields: Any) -> Answer:
        """Sends a chat completion; greedy and short unless told otherwise."""
        document = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 16} | fields
        return self.request("/v1/chat/completions", json.dumps(document).encode())

    def replicas(self) -> list[dict[str, Any]]:
        """Returns the replicas that the proxy knows, as the admin address tells them."""
        answer = self.request("/admin/v1/replicas", is_admin=True)
        assert answer.status == 200, answer.body
        return [entry["replica"] for entry in answer.json["replicas"]]

    def ready_replicas(self) -> list[dict[str, Any]]:
        """Returns the replicas that take requests."""
        return [replica for replica in self.replicas() if replica["state"] == "REPLICA_STATE_READY"]

    def go_cold(self) -> None:
        """Brings the model to zero replicas and waits until they are gone."""
        result = self.helios("scale", MODEL, "0")
        assert result.returncode == 0, result.stdout + result.stderr
        self.wait(lambda: not self.replicas(), 60, "no replica is left")

    def grpcurl(self, *arguments: str, timeout_seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Runs grpcurl in plain text."""
        return subprocess.run(
            [GRPCURL, "-plaintext", *arguments], capture_output=True, text=True, timeout=timeout_seconds, check=False
        )

    def discard(self) -> None:
        """Removes the state directory and the socket directory that stands in for a long path."""
        shutil.rmtree(self.state, ignore_errors=True)


def _answer(response: HTTPResponse) -> Answer:
    return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, response.read())
