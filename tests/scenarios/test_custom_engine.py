"""A user's class behind the public address: brought as a file, named by a model, asked like any other model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.running_mesh import RunningMesh

CLASS = """
import litserve as ls


class Shouting(ls.LitAPI):
    def __init__(self):
        super().__init__(stream=True)

    def setup(self, device):
        self.mark = "!"

    def decode_request(self, request):
        return request["messages"][-1]["content"]

    def predict(self, text):
        for word in text.split():
            yield word.upper() + self.mark + " "

    def encode_response(self, parts):
        yield from parts


class Broken(Shouting):
    def setup(self, device):
        raise RuntimeError("the weights of this class are at home")
"""
NAMES = ("shouting", "broken")


@pytest.fixture
def models(mesh: RunningMesh, smollm2_directory: Path) -> Iterator[None]:
    """Two models with classes of the user's as their engines; the files are those of another model, stored once."""
    directory = mesh.state / "worker" / "engines"
    directory.mkdir(exist_ok=True)
    (directory / "loud.py").write_text(CLASS)
    for name in NAMES:
        added = mesh.helios("models", "add", name, str(smollm2_directory))
        assert added.returncode == 0, added.stdout + added.stderr
        settings = json.dumps({"engine": f"custom:loud:{name.capitalize()}"}).encode()
        answer = mesh.request(f"/admin/v1/engine-settings/{name}", settings, method="PUT", is_admin=True)
        assert answer.status == 200, answer.body
    yield
    for name in NAMES:
        assert mesh.helios("models", "rm", name).returncode == 0
    (directory / "loud.py").unlink()


def test_a_class_of_the_user_s_answers_and_one_that_fails_says_why(mesh: RunningMesh, models: None) -> None:
    messages = [{"role": "user", "content": "hello from the edge"}]
    answer = mesh.chat(model="shouting", messages=messages)
    assert answer.status == 200, answer.body
    assert answer.json["model"] == "shouting"
    assert answer.json["choices"][0]["message"]["content"] == "HELLO! FROM! THE! EDGE! "
    streamed = mesh.chat(model="shouting", messages=messages, stream=True)
    *chunks, done = streamed.body.decode().removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    parts = [json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"].get("content") for chunk in chunks]
    assert [part for part in parts if part] == ["HELLO! ", "FROM! ", "THE! ", "EDGE! "]
    (replica,) = [replica for replica in mesh.ready_replicas() if replica["model"] == "shouting"]
    assert replica["engine"] == "custom"
    broken = mesh.chat(model="broken", messages=messages)
    assert broken.status >= 400
    assert "RuntimeError: the weights of this class are at home" in broken.error["message"]
