"""Mapped weights on the real engine: made beside a replica, mapped by the next, the same tokens from less memory."""

import asyncio
import contextlib
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.worker.artifacts.requests import PACKED_WEIGHTS, ArtifactRequest
from helios.worker.replica.artifact_directory import PROVEN, mark_proven
from helios.worker.replica.packed_weights import MANIFEST, WEIGHTS, PackedInputs, has_failed, read_manifest
from helios.worker.replica.packed_writer import bring_in
from helios.worker.replica.settings import EngineSettings, LoraAdapter, LoraSettings
from helios.worker.supervisor.measuring import private_bytes
from tests.worker.artifacts.nodes import open_cluster
from tests.worker.replica.generated import make_adapter
from tests.worker.replica.support import MODEL, Launcher, Leaves, RunningReplica
from tests.worker.replica.test_replica_real import START_SECONDS, body, read
from tests.worker.replica.test_settings_real import running

pytestmark = pytest.mark.real_model

QUESTIONS = ("What is bread?", "List three rivers. " * 20, "x")
TOKENS = 12
PACK_SECONDS = 100.0
PIRATE = "sha256:" + "a" * 64
LORA = EngineSettings(lora=LoraSettings((LoraAdapter("pirate", "pirate-lora", PIRATE),)))


@dataclass(frozen=True)
class Answers:
    """Tokens with their log probabilities, which show a difference long before tokens do; what the tree held then."""

    tokens: list[list[tuple[str, float]]]
    private_bytes: int


@dataclass(frozen=True)
class Node:
    """A worker's directory of packed weights, with one artifact, and what a replica that loaded answers."""

    packed: Path
    loaded: Answers

    @property
    def artifact(self) -> Path:
        (path,) = (path for path in self.packed.iterdir() if (path / MANIFEST).exists())
        return path

    def wait_packed(self, launcher: Launcher) -> None:
        deadline = time.monotonic() + PACK_SECONDS
        while not list(self.packed.glob(f"[0-9a-f]*/{MANIFEST}")):
            assert time.monotonic() < deadline, "no artifact"
            hurry(launcher)
            time.sleep(0.1)


def hurry(launcher: Launcher) -> None:
    """Gives a helper the share of a core that others have: it works with what they leave, which may be nothing."""
    for child in psutil.Process(launcher.process.pid).children():
        with contextlib.suppress(OSError):
            os.sched_setscheduler(child.pid, os.SCHED_OTHER, os.sched_param(0))
            Path(f"/proc/{child.pid}/autogroup").write_text("0")


def ask_all(replica: RunningReplica, model: str = MODEL) -> Answers:
    tokens = asyncio.run(answer_all(replica, model))
    return Answers(tokens, private_bytes(process.pid for process in replica.tree()))


async def answer_all(replica: RunningReplica, model: str = MODEL) -> list[list[tuple[str, float]]]:
    async with replica.leaves.dial(replica.address) as dialer:
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        # One at a time: what a batch is made of changes its products.
        return [await complete(stub, model, question) for question in QUESTIONS]


async def complete(stub: Any, model: str, question: str) -> list[tuple[str, float]]:
    fields = {"model": model, "messages": [{"role": "user", "content": question}], "logprobs": True}
    call = stub.CreateChatCompletion(
        body(**fields, max_tokens=TOKENS, ignore_eos=True), timeout=START_SECONDS, wait_for_ready=True
    )
    (answer,) = await read(call)
    return [
        (entry["token"], entry["logprob"]) for entry in orjson.loads(answer.data)["choices"][0]["logprobs"]["content"]
    ]


def mapped_files(replica: RunningReplica) -> set[str]:
    """Returns the paths of the packed weights that the tree maps, and that it does not map writably for others."""
    lines = [line for process in replica.tree() for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
    weights = [line.split() for line in lines if line.endswith(WEIGHTS)]
    assert all(fields[1].endswith("p") for fields in weights), "private: nobody writes to the file"
    return {fields[-1] for fields in weights}


@pytest.fixture(scope="module")
def node(launcher: Launcher, leaves: Leaves, tmp_path_factory: pytest.TempPathFactory, smollm2_directory: Path) -> Node:
    packed, directory = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("maker")
    changes = {"packed_weights_directory": str(packed), "supervisor_address": ""}
    with running(launcher, leaves, directory, smollm2_directory, EngineSettings(), **changes) as replica:
        node = Node(packed, ask_all(replica))
        assert mapped_files(replica) == set(), "there was nothing to map"
        node.wait_packed(launcher)
    return node


def test_a_mapped_replica_computes_bit_by_bit_what_one_that_loaded_does_from_less_memory(
    node: Node, launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    changes = {"packed_weights_directory": str(node.packed), "supervisor_address": ""}
    with running(launcher, leaves, tmp_path, smollm2_directory, EngineSettings(), **changes) as replica:
        answers = ask_all(replica)
        assert mapped_files(replica) == {str(node.artifact / WEIGHTS)}
    assert answers.tokens == node.loaded.tokens
    # What lies in the file is no memory of the replica's any more, but for what packing rounds up.
    weights_bytes = (node.artifact / WEIGHTS).stat().st_size
    assert node.loaded.private_bytes - answers.private_bytes > 0.9 * weights_bytes


async def test_what_another_node_packed_is_taken_instead_of_packing_and_mapped(
    node: Node, launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    async with (
        open_cluster(tmp_path, smollm2_directory) as cluster,
        cluster.node("first") as first,
        cluster.node("second") as second,
    ):
        request = adopt(node, first.packed, tmp_path / "lent", cluster.revision)
        first.keeper.note_proven(request)
        async with asyncio.timeout(PACK_SECONDS):
            while (published := await second.client.find(request.kind, request.key)) is None:
                await asyncio.sleep(0.1)
        changes = {"packed_weights_directory": str(second.packed), "supervisor_address": ""}
        changes |= {"revision": cluster.revision, "artifact_door": second.door}
        taken = second.packed / request.key
        # The first start waits for nothing and loads, as it did on the first node.
        with running(launcher, leaves, second.directory, smollm2_directory, EngineSettings(), **changes):
            async with asyncio.timeout(PACK_SECONDS):
                while not taken.exists():
                    hurry(launcher)
                    await asyncio.sleep(0.05)
        assert (taken / WEIGHTS).stat().st_nlink >= 3, "the storage agent's, its view's and the node's are one file"
        assert published.size_bytes == sum((taken / name).stat().st_size for name in (MANIFEST, WEIGHTS))
        assert not has_failed(taken)
        with running(launcher, leaves, second.directory, smollm2_directory, EngineSettings(), **changes) as replica:
            assert await answer_all(replica) == node.loaded.tokens
            assert mapped_files(replica) == {str(taken / WEIGHTS)}
    assert (taken / PROVEN).exists()


def adopt(node: Node, packed: Path, lent: Path, revision: str) -> ArtifactRequest:
    """Has a node hold, proven, the artifact that was made, as one of another revision with the same files."""
    manifest = read_manifest(node.artifact)
    inputs = PackedInputs(**{**manifest.inputs, "revision": revision})
    lent.mkdir()
    (lent / WEIGHTS).hardlink_to(node.artifact / WEIGHTS)
    (lent / MANIFEST).write_text(replace(manifest, inputs=asdict(inputs)).to_json())
    mark_proven(bring_in(str(packed), inputs.key, lent))
    return ArtifactRequest(PACKED_WEIGHTS, inputs.document, revision, "maker")


def test_adapters_work_on_mapped_weights(
    node: Node, launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    answers = {}
    paths = {PIRATE: str(make_adapter(smollm2_directory, tmp_path / "adapter"))}
    for name in ("loaded", "mapped"):
        directory = tmp_path / name
        directory.mkdir()
        changes: dict[str, Any] = {"revision_paths": paths, "supervisor_address": ""}
        changes["packed_weights_directory"] = str(node.packed) if name == "mapped" else ""
        with running(launcher, leaves, directory, smollm2_directory, LORA, **changes) as replica:
            answers[name] = [ask_all(replica, model).tokens for model in (MODEL, "pirate")]
            assert len(mapped_files(replica)) == (name == "mapped")
    assert answers["loaded"] == answers["mapped"]
    assert answers["mapped"][0] != answers["mapped"][1]


def test_what_is_damaged_is_loaded_and_made_again(
    node: Node, launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    weights = node.artifact / WEIGHTS
    inode = weights.stat().st_ino
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.write(b"\xff" * 4096)
    changes = {"packed_weights_directory": str(node.packed), "supervisor_address": ""}
    with running(launcher, leaves, tmp_path, smollm2_directory, EngineSettings(), **changes) as replica:
        assert ask_all(replica).tokens == node.loaded.tokens
        assert mapped_files(replica) == set()
        assert "packed weights are dropped" in replica.log_or_empty()
        node.wait_packed(launcher)
    assert (node.artifact / WEIGHTS).stat().st_ino != inode
