"""Matrix products from packed weights that lie in mapped memory: torch's own oneDNN, in place of vLLM's.

A packed weight is a tensor of torch's that nobody looks into: its bytes, and a layout in the library's words. What
makes one over memory of somebody else's is the interface that torch keeps for the constants of models that it compiled.
"""

import base64
import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch._C import _aoti

from helios.worker.replica.packed_weights import PackedMatrix

Product = Callable[[torch.Tensor, Any, torch.Tensor | None], torch.Tensor]
"""``product(x, weight, bias)``, as vLLM calls ``layer.cpu_linear``; ``weight`` is not looked at."""
# One row takes another kernel than many, and odd numbers leave tails.
_ROW_COUNTS: Final = (1, 2, 5, 16, 37, 130)
# What a layer gets may be a part of what another one made.
_NEIGHBOUR_COLUMNS: Final = 64


def pack_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Packs ``[outputs, inputs]`` for any number of rows. Raises RuntimeError where torch can't."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def packed_bytes(packed: torch.Tensor) -> memoryview:
    """Returns the memory of a packed weight, as long as that lives."""
    return bytes_at(torch.ops.mkldnn.data_ptr(packed), int(torch.ops.mkldnn._nbytes(packed)))


def packed_layout(packed: torch.Tensor) -> str:
    """Returns in which form it is packed, base64."""
    return base64.b64encode(bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())).decode()


def mapped_product(mapping: torch.Tensor, entry: PackedMatrix, layout: str) -> Product:
    """Returns the products with a matrix that lies in ``mapping``, which has to outlive them.

    Raises:
        ValueError: It is not one of this layout. (A layout is the library's own, and believed: who could write one
            could write the weights.)
    """
    address = mapping.data_ptr() + entry.offset
    packed = _packed_tensor(address, entry.shape, getattr(torch, entry.dtype), base64.b64decode(layout, validate=True))
    if int(torch.ops.mkldnn._nbytes(packed)) != entry.size_bytes or torch.ops.mkldnn.data_ptr(packed) != address:
        raise ValueError(f"{entry.layer} is of another size than its layout")
    return _product(packed)


def computes_alike(weight: torch.Tensor, multiply: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> bool:
    """Tries whether products with the packed weight are those of ``multiply(x, bias)``, bit by bit.

    Args:
        weight: ``[outputs, inputs]``.
        multiply: vLLM's product with the same weight.
    """
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = weight.shape
    with torch.inference_mode():
        try:
            product = _product(pack_matrix(weight))
        except RuntimeError:
            return False
        random = functools.partial(torch.randn, generator=generator)
        biases = None, random(outputs).to(weight.dtype)
        for rows in _ROW_COUNTS:
            wide = random(rows, inputs + _NEIGHBOUR_COLUMNS).to(weight.dtype)
            for x in (wide[:, :inputs].contiguous(), wide[:, :inputs]):
                if not all(torch.equal(product(x, None, bias), multiply(x, bias)) for bias in biases):
                    return False
    return True


def _product(packed: torch.Tensor) -> Product:
    """Returns what vLLM calls as ``layer.cpu_linear``."""
    run = torch.ops.mkldnn._linear_pointwise.default

    def product(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        del weight
        result: torch.Tensor = run(x, packed, bias, "none", [], "")
        return result

    return product


def _packed_tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype, layout: bytes) -> torch.Tensor:
    """Makes a packed tensor over memory that somebody else keeps.

    Source: torch/csrc/inductor/aoti_torch/c/shim.h, the interface that torch keeps stable for compiled models.
    """
    shim = _shim()
    handle = ctypes.c_void_p()
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    strides = (ctypes.c_int64 * len(shape))()
    status = shim.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(address),
        ctypes.c_int64(len(shape)),
        sizes,
        strides,
        ctypes.c_int64(0),
        ctypes.c_int32(getattr(shim, f"aoti_torch_dtype_{dtype_name(dtype)}")()),
        ctypes.c_int32(shim.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),
        ctypes.byref(handle),
        ctypes.c_int32(shim.aoti_torch_layout__mkldnn()),
        (ctypes.c_uint8 * len(layout)).from_buffer_copy(layout),
        ctypes.c_int64(len(layout)),
    )
    if status != 0:
        raise ValueError("torch does not know the layout of packed weights")
    tensor: torch.Tensor = _aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule(handle.value))
    return tensor


@functools.cache
def _shim() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _capsule(address: int | None) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(address, None, None)


def bytes_at(address: int, size_bytes: int) -> memoryview:
    """Returns memory that somebody else keeps."""
    return memoryview((ctypes.c_uint8 * size_bytes).from_address(address)).cast("B") if size_bytes else memoryview(b"")


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
