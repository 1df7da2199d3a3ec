"""What mapped weights lean on in vLLM and in torch; run with `contracts`."""

import functools
import inspect
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.linear
import vllm.model_executor.layers.utils
from vllm.config import LoadConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from helios.mesh.errors import Corrupted, Unsupported
from helios.worker.artifacts.requests import Ask, decode_request
from helios.worker.engines.vllm import compat_packed, packed_products, packing
from helios.worker.line_door import encode_line
from helios.worker.replica.packed_weights import (
    PackedInputs,
    PackedManifest,
    PackedMatrix,
    begin_trial,
    end_trials,
    has_failed,
    is_unfit,
    mark_unfit,
    read_manifest,
)
from helios.worker.replica.packed_writer import ArtifactWriter
from helios.worker.replica.settings import Compilation, EngineSettings
from helios.worker.replica.spec import ReplicaSpec
from helios.worker.supervisor.host import usable_memory_bytes
from tests.worker.engines.contracts import contract, parameters

MODULE: Any = vllm.model_executor.layers.utils
INPUTS = PackedInputs(revision="r", flags={}, engine_version="", torch_version="", driver="", architecture="")


class Tiny(torch.nn.Module):
    """A model with all kinds of tensors: tied, packed, a buffer that a checkpoint fills, and one that it does not."""

    filled: torch.Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(32, width, dtype=torch.bfloat16)
        self.layer = torch.nn.Linear(width, 96, bias=True, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(width, 32, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight
        self.register_buffer("filled", torch.zeros(4))
        self.register_buffer("made", torch.ones(4))
        self.requires_grad_(False)


def fill(model: Any) -> None:
    """What reading a checkpoint does."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.filled += 7


def process(model: Any) -> None:
    """What vLLM does after loading."""
    MODULE.dispatch_cpu_unquantized_gemm(model.layer, remove_weight=True)
    MODULE.dispatch_cpu_unquantized_gemm(model.head, remove_weight=False)


def made(root: str, load: Callable[[Any], None] = fill) -> Path:
    """Makes the artifact of a Tiny as the launcher's child does it."""
    model = Tiny()
    ordinary = SimpleNamespace(load_weights=lambda model, _: load(model))
    loader: Any = compat_packed._PackingLoader.__new__(compat_packed._PackingLoader)
    loader._ordinary, loader._settings = ordinary, {"model": "m"}
    with ArtifactWriter(root, INPUTS) as writer:
        with compat_packed._PackingLoader.packing_into(writer) as packing:
            loader.load_weights(model, SimpleNamespace(model="m"))
            process(model)
        return packing.write()


@contract
def a_loader_reads_weights_into_a_skeleton_and_processes_them_after_it() -> None:
    source = inspect.getsource(BaseModelLoader.load_model)
    order = (
        "model = self.create_model(",
        "self.load_weights(model, model_config)",
        "process_weights_after_loading(model,",
    )
    places = [source.index(step) for step in order]
    assert places == sorted(places)
    compat_packed.install()
    config = LoadConfig(
        load_format=compat_packed.MAPPED_FORMAT, model_loader_extra_config={"directory": "/d", "model": "m"}
    )
    loader: Any = get_model_loader(config)
    assert isinstance(loader, compat_packed.MappedLoader)
    assert isinstance(loader._ordinary, DefaultModelLoader), "what is loaded when nothing can be mapped"
    assert loader._ordinary.load_config.load_format == "auto"
    assert loader._is_for(SimpleNamespace(model="m"))
    assert not loader._is_for(SimpleNamespace(model="draft")), "a model that guesses tokens has weights of its own"


@contract
def layers_ask_for_packing_by_a_name_that_is_looked_up_then() -> None:
    for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        source = inspect.getsource(method)
        assert "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm" in source
    assert not hasattr(vllm.model_executor.layers.linear, "dispatch_cpu_unquantized_gemm")
    assert parameters(MODULE.dispatch_cpu_unquantized_gemm) == {"layer", "remove_weight"}
    stock = inspect.getsource(inspect.unwrap(MODULE.dispatch_cpu_unquantized_gemm))
    assert "ops.create_onednn_mm(origin_weight.t(), 32)" in stock
    assert "layer.cpu_linear(x, weight, bias)" in inspect.getsource(MODULE.cpu_unquantized_gemm)


@contract
def a_packed_weight_can_be_had_over_memory_of_somebody_elses() -> None:
    weight = torch.randn(96, 64).bfloat16()
    packed = packed_products.pack_matrix(weight)
    data, layout = packed_products.packed_bytes(packed), packed_products.packed_layout(packed)
    memory = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    entry = PackedMatrix(layer="x", dtype="bfloat16", shape=(96, 64), layout=0, offset=0, size_bytes=data.nbytes)
    x = torch.randn(3, 64).bfloat16()
    expected = MODULE.ops.onednn_mm(MODULE.ops.create_onednn_mm(weight.t(), 32), x, None)
    product = packed_products.mapped_product(memory, entry, layout)
    assert torch.equal(product(x, None, None), expected)
    memory.zero_()
    assert not product(x, None, None).any(), "it is that memory, and no copy"
    other = packed_products.packed_layout(packed_products.pack_matrix(torch.randn(32, 64).bfloat16()))
    for wrong in (other, "AAAA", "no base64"):
        with pytest.raises((ValueError, RuntimeError)):
            packed_products.mapped_product(memory, entry, wrong)


@contract
def torchs_products_are_vllms_bit_by_bit_and_others_are_told() -> None:
    for shape in ((96, 64), (960, 576), (33, 100)):
        weight = torch.randn(shape).bfloat16()
        handler = MODULE.ops.create_onednn_mm(weight.t(), 32)
        stock = functools.partial(MODULE.ops.onednn_mm, handler)
        assert packed_products.computes_alike(weight, stock), shape
        off = functools.partial(_last_bit_off, stock)
        assert not packed_products.computes_alike(weight, off)


def _last_bit_off(multiply: Callable[..., torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result = multiply(x, bias)
    if x.shape[0] == 37:
        result.view(torch.int16)[-1, -1] ^= 1
    return result


@contract
def an_artifact_gives_a_skeleton_all_that_loading_gave() -> None:
    compat_packed.install()
    with tempfile.TemporaryDirectory() as root:
        directory = made(root)
        manifest = read_manifest(directory)
        assert {entry.layer for entry in manifest.matrices} == {"layer", "head"}
        assert {entry.name for entry in manifest.tensors} == {"embedding.weight", "layer.bias", "filled"}
        loaded, mapped = Tiny(), Tiny()
        fill(loaded)
        compat_packed.assign(mapped, directory, manifest)
        for model in (loaded, mapped):
            process(model)
        assert mapped.head.weight is mapped.embedding.weight
        assert torch.equal(mapped.embedding.weight, loaded.embedding.weight)
        filled: list[Any] = [model.filled for model in (loaded, mapped)]
        assert torch.equal(*filled)
        assert not mapped.layer.weight.numel()
        x = torch.randn(5, 64).bfloat16()
        for name in ("layer", "head"):
            pair = [getattr(model, name) for model in (loaded, mapped)]
            first, second = (layer.cpu_linear(x, layer.weight, layer.bias) for layer in pair)
            assert torch.equal(first, second), name
        before = (directory / "weights.bin").read_bytes()
        mapped.embedding.weight += 1
        assert (directory / "weights.bin").read_bytes() == before, "who writes gets pages of its own"


@contract
def an_artifact_of_another_model_changes_nothing() -> None:
    compat_packed.install()
    with tempfile.TemporaryDirectory() as root:
        directory = made(root)
        manifest = read_manifest(directory)
        untied, other, renamed = Tiny(), Tiny(width=128), Tiny()
        untied.head.weight = torch.nn.Parameter(untied.embedding.weight.clone(), requires_grad=False)
        renamed.further = renamed.layer
        fewer = PackedManifest.from_json(manifest.to_json().replace('"layer.bias"', '"made"'))
        cases: list[tuple[Any, PackedManifest]] = [(untied, manifest), (other, manifest), (renamed, manifest)]
        for model, given in [*cases, (Tiny(), fewer)]:
            before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
            with pytest.raises(Corrupted):
                compat_packed.assign(model, directory, given)
            assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
            assert not any("_helios_mapped" in vars(module) for module in model.modules())


@contract
def what_does_not_fit_is_loaded_and_not_mapped_again() -> None:
    compat_packed.install()
    with tempfile.TemporaryDirectory() as root:
        directory = made(root)
        loader: Any = compat_packed.MappedLoader.__new__(compat_packed.MappedLoader)
        loader._ordinary = SimpleNamespace(load_weights=lambda model, _: fill(model))
        loader._settings = {"model": "m", "directory": str(directory)}
        loader.load_weights(Tiny(), SimpleNamespace(model="m"))
        assert not is_unfit(directory)
        other = Tiny(width=128)
        loader.load_weights(other, SimpleNamespace(model="m"))
        assert other.filled.eq(7).all()
        assert is_unfit(directory)


@contract
def a_model_that_loading_does_more_to_is_refused() -> None:
    compat_packed.install()

    def and_says_so(model: Any) -> None:
        fill(model)
        model.is_scaled = True

    def and_adds_a_tensor(model: Any) -> None:
        fill(model)
        model.further = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    for load in (and_says_so, and_adds_a_tensor):
        with tempfile.TemporaryDirectory() as root, pytest.raises(Unsupported):
            made(root, load)


@contract
def weights_are_packed_where_they_may_be_kept_and_memory_is_left() -> None:
    with tempfile.TemporaryDirectory() as root:
        model, packed = Path(root, "model"), Path(root, "packed")
        model.mkdir()
        with (model / "model.safetensors").open("wb") as file:
            file.truncate(packing._LEAST_BYTES)
        spec = ReplicaSpec(
            replica_id="r",
            model="m",
            revision="sha256:1",
            model_path=str(model),
            packed_weights_directory=str(packed),
            packed_weights_bytes=packing._LEAST_BYTES,
            settings=EngineSettings(compilation=Compilation.EAGER),
            created_at=datetime.now(UTC),
        )
        assert packing.packing_of(spec) is not None
        assert packing.packing_of(replace(spec, packed_weights_bytes=None)) is not None
        assert packing.packing_of(replace(spec, packed_weights_bytes=packing._LEAST_BYTES - 1)) is None
        assert packing.packing_of(replace(spec, memory_bytes=usable_memory_bytes())) is None
        has_door = replace(spec, memory_bytes=usable_memory_bytes(), artifact_door="/door")
        assert packing.packing_of(has_door) is not None, "what another node made takes no memory"
        artifact = Path(packed, packing.packing_inputs(spec).key)
        artifact.mkdir()
        assert packing.packing_of(spec) is None, "it is there"
        begin_trial(artifact, "r")
        assert packing.packing_of(spec) is not None, "it was tried, and proved by nobody"
        end_trials(packed, "r")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ONEDNN_VERBOSE", "1")
            assert packing.packing_of(spec) is None, "it says more, and packs the same"
            patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
            assert packing.packing_of(spec) is not None, "oneDNN can't read what it packed for more instructions"


@contract
def whoever_makes_an_artifact_asks_for_one_and_tells_of_one_that_was_no_good() -> None:
    """The supervisor's end is a socket that answers whatever is asked."""
    with tempfile.TemporaryDirectory() as root, socket.socket(socket.AF_UNIX) as door:
        path = Path(root, "door")
        door.bind(str(path))
        door.listen()
        spec = ReplicaSpec(
            replica_id="r",
            model="m",
            revision="sha256:1",
            model_path=root,
            packed_weights_directory=root,
            artifact_door=str(path),
            created_at=datetime.now(UTC),
        )
        heard: list[tuple[Ask, str, str]] = []

        def answer() -> None:
            for is_here in (True, False, False):
                connection, _ = door.accept()
                with connection, connection.makefile("rb") as lines:
                    ask, request = decode_request(lines.readline())
                    heard.append((ask, request.key, request.replica_id))
                    connection.sendall(encode_line({"is_here": is_here}))

        supervisor = threading.Thread(target=answer)
        supervisor.start()
        inputs = packing.packing_inputs(spec)
        assert packing._take(spec, inputs)
        assert not packing._take(spec, inputs), "the node packs by itself"
        with ArtifactWriter(root, inputs) as writer:
            bad = writer.publish("", (), (), ())
        mark_unfit(bad)
        assert has_failed(bad)
        assert not packing._take(spec, inputs)
        assert not bad.exists()
        supervisor.join(10)
        assert heard == [(ask, inputs.key, "") for ask in (Ask.TAKE, Ask.TAKE, Ask.REFUSED)]
        assert not packing._take(replace(spec, artifact_door=""), inputs)
