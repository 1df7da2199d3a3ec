"""What loading weights while they come leans on in vLLM; run with the other contracts."""

import inspect
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from helios.worker.early.asking import BytesLost
from helios.worker.early.view import MARK
from helios.worker.engines.vllm import compat_early, compat_packed
from tests.worker.engines.contracts import contract

# Two files whose tensors go by turns, and one that no index names.
SHARDS = {
    "model-1.safetensors": {"a": torch.arange(8.0), "c": torch.arange(4.0)},
    "model-2.safetensors": {"b": torch.ones(6), "d": torch.zeros(2)},
}
LOST = "lost"


class Scripted:
    """What is here, step by step: spans by file, or that all is lost; after the last step it is lent."""

    def __init__(self, steps: Sequence[dict[str, tuple[int, int]] | str]) -> None:
        self.steps = list(steps)
        self.here: dict[str, tuple[int, int]] = {}
        self.is_whole = False
        self.counts = True
        self.waited_seconds = 0.5
        self.weights = [*SHARDS, "other.safetensors"]

    def covers(self, path: str, start: int, end: int) -> bool:
        first, last = self.here.get(path, (0, 0))
        return self.is_whole or first <= start <= end <= last

    def wait_more(self) -> None:
        step = self.steps.pop(0)
        if isinstance(step, str):
            raise BytesLost("the fetch began anew")
        self.here |= step

    def wait_whole(self) -> None:
        self.is_whole = True

    def end(self) -> bool:
        return self.counts


class Recording(torch.nn.Module):
    """A model that notes what it is given, and copies it as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[str] = []
        self.values: dict[str, Any] = {}

    def load_weights(self, weights: Iterator[tuple[str, Any]]) -> set[str]:
        for name, tensor in weights:
            self.given.append(name)
            self.values[name] = tensor.clone()
        return set(self.values)


@contextmanager
def loading(*steps: dict[str, tuple[int, int]] | str) -> Iterator[tuple[Any, Scripted, dict[str, int]]]:
    """A loader of a model on its way, what it is told, and the sizes of the files."""
    with tempfile.TemporaryDirectory() as root:
        for name, tensors in SHARDS.items():
            save_file(tensors, Path(root, name))
        save_file({"x": torch.ones(1)}, Path(root, "other.safetensors"))
        index = {"weight_map": {tensor: name for name, tensors in SHARDS.items() for tensor in tensors}}
        Path(root, "model.safetensors.index.json").write_text(json.dumps(index))
        Path(root, MARK).touch()
        compat_early.install()
        settings = {"door": "/none", "replica_id": "r", "model": root}
        loader: Any = get_model_loader(
            LoadConfig(load_format=compat_early.EARLY_FORMAT, model_loader_extra_config=settings)
        )
        loader._arrivals = told = Scripted(steps)
        yield loader, told, {name: Path(root, name).stat().st_size for name in SHARDS}


def config(loader: Any, quantization: str | None = None) -> Any:
    return SimpleNamespace(
        model=loader._model, revision=None, quantization=quantization, multimodal_config=None, is_moe=False
    )


def check_values(model: Recording) -> None:
    expected = {name: tensor for tensors in SHARDS.values() for name, tensor in tensors.items()}
    assert model.values.keys() == expected.keys()
    assert all(torch.equal(model.values[name], tensor) for name, tensor in expected.items())


@contract
def the_early_loader_is_vllms_default_one_and_hands_tensors_over_as_they_arrive() -> None:
    with loading() as (_, _, sizes):
        one, two = sizes
    tensor_bytes = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in SHARDS.items()}
    header = sizes[two] - tensor_bytes[two]
    steps: list[dict[str, tuple[int, int]] | str] = [
        {two: (0, header)},
        {one: (0, 20)},
        {two: (0, sizes[two] - 8)},
        {one: (0, sizes[one])},
        {two: (0, sizes[two])},
    ]
    with loading(*steps) as (loader, told, _), single():
        assert isinstance(loader, DefaultModelLoader)
        assert loader.load_config.load_format == "auto"
        model = Recording()
        loader.load_weights(model, config(loader))
        assert model.given == ["b", "a", "c", "d"]
        check_values(model)
        assert told.steps == []
        assert compat_early.take_waited_seconds() == 0.5
        assert compat_early.take_waited_seconds() == 0.0


@contract
def a_load_that_was_cut_off_reads_again_what_is_lent() -> None:
    for counts in (True, False):
        with loading() as (_, _, sizes):
            whole = {name: (0, size) for name, size in sizes.items()}
        steps = [whole] if not counts else [{next(iter(sizes)): (0, 400)}, LOST]
        with loading(*steps) as (loader, told, _), single():
            told.counts = counts
            model = Recording()
            loader.load_weights(model, config(loader))
            assert told.is_whole
            check_values(model)
            assert len(model.given) >= 5, "some of it twice"
    with loading(LOST) as (loader, _, _), single(), pytest.raises(BytesLost):
        loader.load_weights(Recording(), config(loader, "fp8"))


@contract
def what_is_not_the_plain_reading_of_the_model_waits_until_it_is_lent() -> None:
    with loading() as (loader, told, _):
        sources: list[dict[str, Any]] = [
            {"model_or_path": "/elsewhere"},
            {"subfolder": "sub"},
            {"allow_patterns_overrides": ["*.safetensors"]},
        ]
        for change in sources:
            fields = {"model_or_path": loader._model, "revision": None} | change
            assert not loader._is_plain(DefaultModelLoader.Source(**fields))
        plain = DefaultModelLoader.Source(loader._model, None)
        assert loader._is_plain(plain)
        loader.load_config.safetensors_load_strategy = "eager"
        assert not loader._is_plain(plain)
        tensors = dict(loader._get_weights_iterator(plain))
        assert told.is_whole
        assert tensors.keys() == {"a", "b", "c", "d"}


@contract
def packed_weights_that_do_not_fit_a_model_on_its_way_are_no_reason_to_read_too_early() -> None:
    with loading() as (loader, _, _):
        early = {"door": "/none", "replica_id": "r", "model": loader._model}
        extra = {"directory": "/d", "model": loader._model, "early": early}
        compat_packed.install()
        mapped: Any = get_model_loader(
            LoadConfig(load_format=compat_packed.MAPPED_FORMAT, model_loader_extra_config=extra)
        )
        assert isinstance(mapped._ordinary, compat_early.EarlyLoader)


@contract
def a_configuration_looks_into_headers_for_types_and_for_a_tied_output_layer_only() -> None:
    untie = inspect.getsource(ModelConfig.maybe_untie_word_embeddings)
    tied = untie.index('if not getattr(self.hf_config, "tie_word_embeddings", False):')
    assert tied < untie.index("checkpoint_has_lm_head(")
    types = inspect.getsource(ModelArchConfigConvertorBase)
    assert types.index("if config_dtype is None:") < types.index("get_safetensors_params_metadata(")


@contextmanager
def single() -> Iterator[None]:
    """VLLM asks for the configuration that is in force, for experts."""
    with set_current_vllm_config(VllmConfig()):
        yield
