"""Weights that are loaded while they come: the part of ``compat`` that has vLLM wait for the bytes of each tensor.

vLLM's own loader opens all files of a checkpoint and reads them one after the other. Here tensors are handed to the
model in the order in which they arrive, within a file in the order of their bytes, as vLLM's streaming formats do; the
stock library maps them, and no byte is touched before it is known to be verified. Whatever is not the plain reading of
the model's safetensors files waits until the revision is lent.
"""

import functools
import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import structlog
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

from helios.mesh.errors import Corrupted
from helios.worker.early.asking import Arrivals, BytesLost

log = structlog.get_logger()

EARLY_FORMAT: Final = "helios_early"
"""vLLM's ``load_format`` for a model that is on its way; extra settings are ``door``, ``replica_id`` and ``model``."""
_LENGTH: Final = struct.Struct("<Q")
# As the safetensors library has it.
_MAX_HEADER_BYTES: Final = 100_000_000
# What loads of this process waited for bytes and have not told yet.
_waited: Final = [0.0]


@functools.cache
def install() -> None:
    """Registers the loader, once. Call before any fork."""
    register_model_loader(EARLY_FORMAT)(EarlyLoader)


def take_waited_seconds() -> float:
    """Returns how long loads of this process waited for bytes since this was asked last."""
    seconds, _waited[0] = _waited[0], 0.0
    return seconds


class EarlyLoader(DefaultModelLoader):
    """Loads as vLLM's default loader does, as far as bytes are here; of other models as ever."""

    def __init__(self, load_config: Any) -> None:
        settings = dict(load_config.model_loader_extra_config)
        super().__init__(replace(load_config, load_format="auto", model_loader_extra_config={}))
        self._model: str = settings["model"]
        self._arrivals = Arrivals(settings["door"], settings["replica_id"], self._model)

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Loads; where what was read turns out not to count, loads again what is lent by then.

        Raises:
            BytesLost: A quantised model can't be loaded twice.
            Unavailable: The fetch, or the replica, came to its end.
        """
        arrivals = self._arrivals
        try:
            super().load_weights(model, model_config)
            counts = arrivals.is_whole or arrivals.end()
        except BytesLost:
            counts = False
        if not counts:
            if model_config.quantization is not None:
                raise BytesLost("the fetch of a quantised model began anew while it was loaded")
            log.warning("loaded again: the fetch began anew meanwhile", model=self._model)
            arrivals.wait_whole()
            super().load_weights(model, model_config)
        _waited[0] += arrivals.waited_seconds
        arrivals.waited_seconds = 0.0

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Any]]:
        if self._is_plain(source):
            tensors = self._arriving()
            return ((source.prefix + name, tensor) for name, tensor in tensors)
        self._arrivals.wait_whole()
        ordinary: Iterator[tuple[str, Any]] = super()._get_weights_iterator(source)
        return ordinary

    def _is_plain(self, source: Any) -> bool:
        return bool(
            not self._arrivals.is_whole
            and source.model_or_path == self._model
            and source.subfolder is None
            and source.allow_patterns_overrides is None
            and self._encoder_only_lm_prefixes is None
            and self.load_config.safetensors_load_strategy in (None, "lazy")
        )

    def _arriving(self) -> Iterator[tuple[str, Any]]:
        """Yields the model's tensors as they come. A tensor is a view of the mapped file, and copied by who takes it.

        Raises:
            BytesLost, Unavailable: As ``Arrivals.wait_more``.
            Corrupted: A file is no safetensors file.
        """
        arrivals = self._arrivals
        arrivals.wait_more()
        paths = [str(Path(self._model, name)) for name in arrivals.weights]
        used = filter_duplicate_safetensors_files(paths, self._model, SAFE_WEIGHTS_INDEX_NAME)
        with ExitStack() as stack:
            files = [_ArrivingFile(path, arrivals, stack) for path in sorted(used)]
            while files:
                for file in files:
                    for name, tensor in file.here():
                        if not should_skip_weight(name, self.local_expert_ids):
                            yield name, tensor
                files = [file for file in files if not file.is_done]
                if files:
                    arrivals.wait_more()


class _ArrivingFile:
    """One file of a checkpoint: its tensors in the order of their bytes."""

    def __init__(self, path: str, arrivals: Arrivals, stack: ExitStack) -> None:
        self.is_done = False
        self._path = Path(path)
        self._name = self._path.name
        self._arrivals = arrivals
        self._stack = stack
        self._left: list[tuple[int, int, str]] | None = None
        self._opened: Any = None

    def here(self) -> Iterator[tuple[str, Any]]:
        """Yields the next tensors that are here."""
        if self._left is None and not self._open():
            return
        assert self._left is not None, "it was opened"
        while self._left and self._arrivals.covers(self._name, *self._left[-1][:2]):
            name = self._left.pop()[2]
            yield name, self._opened.get_tensor(name)
        self.is_done = not self._left

    def _open(self) -> bool:
        if not self._arrivals.covers(self._name, 0, _LENGTH.size):
            return False
        with self._path.open("rb", buffering=0) as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > _MAX_HEADER_BYTES:
                raise Corrupted(f"{self._name} is no safetensors file", reason="BAD_CHECKPOINT")
            base = _LENGTH.size + length
            if not self._arrivals.covers(self._name, 0, base):
                return False
            header = _parse(self._name, file.read(length))
        places = ((*entry["data_offsets"], name) for name, entry in header.items())
        # The last one first: they are taken from the end.
        self._left = sorted(((base + start, base + end, name) for start, end, name in places), reverse=True)
        self._opened = self._stack.enter_context(safe_open(self._path, framework="pt"))
        return True


def _parse(name: str, header: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(header)
        parsed.pop("__metadata__", None)
        return dict(parsed)
    except (ValueError, AttributeError, TypeError) as error:
        raise Corrupted(f"{name} is no safetensors file", reason="BAD_CHECKPOINT") from error
