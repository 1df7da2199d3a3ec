"""Mapped weights: the part of ``compat`` that has vLLM take a model's tensors from an artifact, and that makes one.

On a CPU vLLM hands each linear layer's weight to oneDNN, which packs it for the processor into memory of its own, out
of reach, and drops the original. Nearly all of a replica's weights are such copies. torch has oneDNN too, and there the
packed form is a tensor: it can be written out, and made again over mapped memory without a copy, by the calls that
torch's ahead-of-time compiler has for its constants. Both run the same kernels: the products are equal bit by bit,
and that is not believed but tried when an artifact is made, for each shape and with several numbers of rows; a layer
whose products differ stays vLLM's.

So an artifact holds what the modules hold when a checkpoint is loaded, and in place of the weights that oneDNN would
pack, their packed form. What comes after loading (vLLM's ``process_weights_after_loading``) runs as ever, with one
function replaced: the one that hands a weight to oneDNN.

The skeleton of the model is made as ever, too, in memory that is never touched and so never there; only its layout has
to be that of the artifact. Whatever is not as expected before the first tensor is assigned means an ordinary load.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import structlog
import torch
import vllm.model_executor.layers.utils
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from helios.mesh.errors import Corrupted, Unsupported
from helios.worker.engines.vllm.compat_early import EARLY_FORMAT
from helios.worker.engines.vllm.packed_products import (
    bytes_at,
    computes_alike,
    dtype_name,
    mapped_product,
    pack_matrix,
    packed_bytes,
    packed_layout,
)
from helios.worker.replica.packed_weights import (
    WEIGHTS,
    PackedManifest,
    PackedMatrix,
    PlainTensor,
    mark_unfit,
    read_manifest,
)
from helios.worker.replica.packed_writer import ArtifactWriter

log = structlog.get_logger()

MAPPED_FORMAT: Final = "helios_mapped"
"""vLLM's ``load_format`` for a model that is mapped; its extra settings are ``directory`` and ``model``."""
_PACKING_FORMAT: Final = "helios_packing"
# Where a module keeps its mapped matrix until vLLM asks for it to be packed.
_MAPPED: Final = "_helios_mapped"


@functools.cache
def install() -> None:
    """Registers the loaders and has vLLM ask for mapped matrices, once. Call before any fork."""
    module = vllm.model_executor.layers.utils
    original = module.dispatch_cpu_unquantized_gemm

    @functools.wraps(original)
    def dispatch(layer: Any, remove_weight: bool) -> None:
        product = layer.__dict__.pop(_MAPPED, None)
        if product is None:
            original(layer, remove_weight)
            return
        layer.cpu_linear = product
        if remove_weight:
            layer.weight = torch.nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)

    setattr(module, "dispatch_cpu_unquantized_gemm", dispatch)  # noqa: B010  a patch, and visibly one
    register_model_loader(MAPPED_FORMAT)(MappedLoader)
    register_model_loader(_PACKING_FORMAT)(_PackingLoader)


class _OrdinaryLoader(BaseModelLoader):
    """Loads as vLLM does by itself; what is special happens around it."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._settings: dict[str, Any] = dict(load_config.model_loader_extra_config)
        # The checkpoint may be on its way.
        early = self._settings.pop("early", {})
        ordinary = EARLY_FORMAT if early else "auto"
        self._ordinary: Any = get_model_loader(
            replace(load_config, load_format=ordinary, model_loader_extra_config=early)
        )

    def download_model(self, model_config: Any) -> None:
        """Loads nothing from anywhere: the model is on the node."""
        self._ordinary.download_model(model_config)

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Reads the checkpoint into the model's tensors."""
        self._ordinary.load_weights(model, model_config)

    def _is_for(self, model_config: Any) -> bool:
        """Whether this is the model that the artifact is of, not one that guesses tokens for it."""
        return bool(model_config.model == self._settings["model"])


class MappedLoader(_OrdinaryLoader):
    """Maps an artifact; loads as ever where it does not fit."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Assigns the artifact's tensors to those of the model."""
        if self._is_for(model_config):
            directory = Path(self._settings["directory"])
            try:
                assign(model, directory, read_manifest(directory))
            except Corrupted as error:
                log.warning(
                    "packed weights do not fit: an ordinary load", error=error.message, directory=directory.name
                )
                with contextlib.suppress(OSError):
                    mark_unfit(directory)
            else:
                return
        super().load_weights(model, model_config)


def assign(model: Any, directory: Path, manifest: PackedManifest) -> None:
    """Puts a model's tensors over a mapping of an artifact's, without a copy. All of them, or none.

    Pages are private to the process where it writes to them, which nothing does to weights.

    Raises:
        Corrupted: The artifact is not of a model like this. The model is as it was.
    """
    if skeleton_digest(model) != manifest.skeleton:
        raise Corrupted("packed weights are of a model with other tensors")
    try:
        mapping = torch.from_file(str(directory / WEIGHTS), shared=False, size=manifest.size_bytes, dtype=torch.uint8)
        tensors = {entry.name: _plain(mapping, entry) for entry in manifest.tensors}
        products = {
            entry.layer: mapped_product(mapping, entry, manifest.layouts[entry.layout]) for entry in manifest.matrices
        }
    except (AttributeError, RuntimeError, ValueError) as error:
        raise Corrupted(f"packed weights can't be mapped: {error}") from error
    targets, modules = dict(_tensors(model)), dict(model.named_modules(remove_duplicate=False))
    filled = tensors.keys() | {f"{layer}.weight" for layer in products}
    if not targets.keys() >= filled >= {name for name, _ in model.named_parameters()}:
        raise Corrupted("packed weights are not all tensors of the model")
    if any(_form(targets[name]) != _form(tensor) for name, tensor in tensors.items()):
        raise Corrupted("packed weights have other forms than the model's tensors")
    for name, tensor in tensors.items():
        targets[name].data = tensor
    for layer, product in products.items():
        modules[layer].__dict__[_MAPPED] = product
    # Products have only its address.
    model.__dict__[_MAPPED] = mapping


def pack(config: Any, worker_class: Any, init_method: str, writer: ArtifactWriter) -> Path:
    """Makes the artifact of a model, in a process of its own: it loads the model, and leaves vLLM's state behind.

    Args:
        config: VllmConfig of one rank.
        worker_class: What would run it.
        init_method: Where torch's process group of one finds itself.
        writer: Entered; gets the tensors.

    Raises:
        Unsupported: The model can't be had like this.
        OSError, HeliosError: The disk refused.
    """
    if config.model_config.quantization is not None:
        raise Unsupported(f"quantised ({config.model_config.quantization})")
    if config.parallel_config.world_size != 1:
        raise Unsupported("on several ranks")
    settings = {"model": config.model_config.model}
    config.load_config = replace(config.load_config, load_format=_PACKING_FORMAT, model_loader_extra_config=settings)
    with set_current_vllm_config(config), _PackingLoader.packing_into(writer) as packing:
        worker = worker_class(config, local_rank=0, rank=0, distributed_init_method=init_method, is_driver_worker=True)
        worker.init_device()
        worker.load_model()
    return packing.write()


def skeleton_digest(model: Any) -> str:
    """Returns a digest of a model's modules, and of names, kinds, types, shapes and strides of its tensors.

    What a tensor that goes by two names is, is said of both, and that it is one.
    """
    names: dict[int, str] = {}
    lines = [f"{name}:{type(module).__qualname__}" for name, module in model.named_modules(remove_duplicate=False)]
    for name, tensor in _tensors(model):
        first = names.setdefault(id(tensor), name)
        # Buffers are made with the skeleton, and some are as long as the context that was asked for.
        if isinstance(tensor, torch.nn.Parameter):
            lines.append(f"{name}={first}:{tensor.dtype}:{tuple(tensor.shape)}:{tensor.stride()}:{tensor.device}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(slots=True)
class _Packing:
    """What is learned of a model on its way through vLLM's loading. ``matrices`` are weights by their layer's name."""

    writer: ArtifactWriter
    model: Any = None
    skeleton: str = ""
    layers: dict[int, str] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)

    def note_loaded(self, model: Any, buffers: dict[str, str]) -> None:
        """Remembers the tensors as the checkpoint left them; ``buffers`` are checksums from before."""
        self.model = model
        self.layers = {id(module): name for name, module in model.named_modules()}
        loaded = {name: tensor.data for name, tensor in model.named_parameters()}
        loaded |= {name: tensor for name, tensor in model.named_buffers() if _checksum(tensor) != buffers.get(name)}
        self.tensors = loaded
        self.checksums = {name: _checksum(tensor) for name, tensor in loaded.items()}

    def note_packed(self, layer: Any) -> bool:
        """Remembers a weight that oneDNN would pack; False where it is not one of a layer with a name."""
        name = self.layers.get(id(layer))
        if name is None:
            return False
        self.matrices[name] = layer.weight.data
        return True

    def write(self) -> Path:
        """Writes the artifact."""
        left = dict(_tensors(self.model))
        layouts: list[str] = []
        matrices = [self._write_matrix(layer, weight, layouts) for layer, weight in self.matrices.items()]
        plain = []
        for name, tensor in self.tensors.items():
            layer, _, leaf = name.rpartition(".")
            if leaf == "weight" and layer in self.matrices and not left[name].numel():
                continue
            # What vLLM changes after loading, it will change again.
            if _checksum(tensor) != self.checksums[name]:
                raise Unsupported(f"{name} is changed in its place after loading")
            plain.append(self._write_plain(name, tensor))
        return self.writer.publish(self.skeleton, tuple(plain), tuple(matrices), tuple(layouts))

    def _write_plain(self, name: str, tensor: torch.Tensor) -> PlainTensor:
        if not tensor.is_contiguous():
            raise Unsupported(f"{name} is not contiguous")
        return PlainTensor(
            name=name,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            offset=self.writer.append(bytes_at(tensor.data_ptr(), tensor.nbytes)),
            size_bytes=tensor.nbytes,
        )

    def _write_matrix(self, layer: str, weight: torch.Tensor, layouts: list[str]) -> PackedMatrix:
        packed = pack_matrix(weight)
        data, layout = packed_bytes(packed), packed_layout(packed)
        if layout not in layouts:
            layouts.append(layout)
        return PackedMatrix(
            layer=layer,
            dtype=dtype_name(weight.dtype),
            shape=tuple(weight.shape),
            layout=layouts.index(layout),
            offset=self.writer.append(data),
            size_bytes=data.nbytes,
        )


class _PackingLoader(_OrdinaryLoader):
    """Loads a model as ever, and tells a ``_Packing`` what passes. One at a time in a process."""

    _packing: _Packing | None = None

    @classmethod
    @contextlib.contextmanager
    def packing_into(cls, writer: ArtifactWriter) -> Iterator[_Packing]:
        cls._packing = _Packing(writer)
        try:
            with _handing_over(cls._packing):
                yield cls._packing
        finally:
            cls._packing = None

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Reads the checkpoint, and looks that this is all that happens to the model."""
        packing = self._packing
        assert packing is not None
        assert self._is_for(model_config)
        packing.skeleton = skeleton_digest(model)
        state, buffers = _python_state(model), {name: _checksum(tensor) for name, tensor in model.named_buffers()}
        super().load_weights(model, model_config)
        if _python_state(model) != state or skeleton_digest(model) != packing.skeleton:
            raise Unsupported("loading does more to the model than to fill its tensors")
        packing.note_loaded(model, buffers)


@contextlib.contextmanager
def _handing_over(packing: _Packing) -> Iterator[None]:
    """Has weights that vLLM hands to oneDNN go to ``packing``, where torch computes the same with them."""
    module = vllm.model_executor.layers.utils
    dispatch, create = module.dispatch_cpu_unquantized_gemm, module.ops.create_onednn_mm
    current: list[Any] = []
    known: dict[tuple[Any, ...], bool] = {}

    def note_layer(layer: Any, remove_weight: bool) -> None:
        current[:] = [layer]
        dispatch(layer, remove_weight)

    def hand_over(weight: torch.Tensor, *args: Any) -> Any:
        layer = current[0]
        key = (*layer.weight.shape, layer.weight.stride(), layer.weight.dtype)
        if key not in known:
            known[key] = computes_alike(
                layer.weight.data, functools.partial(module.ops.onednn_mm, create(weight, *args))
            )
        if known[key] and packing.note_packed(layer):
            # Nobody computes with this model.
            return None
        return create(weight, *args)

    setattr(module, "dispatch_cpu_unquantized_gemm", note_layer)  # noqa: B010
    setattr(module.ops, "create_onednn_mm", hand_over)  # noqa: B010
    try:
        yield
    finally:
        setattr(module, "dispatch_cpu_unquantized_gemm", dispatch)  # noqa: B010
        setattr(module.ops, "create_onednn_mm", create)  # noqa: B010


def _plain(mapping: torch.Tensor, entry: PlainTensor) -> torch.Tensor:
    view: torch.Tensor = mapping[entry.offset : entry.offset + entry.size_bytes].view(getattr(torch, entry.dtype))
    return view.as_strided(entry.shape, entry.stride, view.storage_offset())


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _python_state(model: Any) -> list[tuple[str, str]]:
    """What modules have beside tensors and modules: values of simple attributes, and which objects the others are."""
    hidden = {"_parameters", "_buffers", "_modules"}
    plain = (str, int, float, bool, bytes, type(None), tuple, list, dict, set)
    state = []
    for name, module in model.named_modules():
        for key, value in sorted(vars(module).items()):
            if key not in hidden:
                state.append((f"{name}.{key}", repr(value) if isinstance(value, plain) else str(id(value))))
    return state


def _checksum(tensor: torch.Tensor) -> str:
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    data = bytes_at(tensor.data_ptr(), tensor.nbytes)
    return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.blake2b(data, digest_size=16).hexdigest()}"
