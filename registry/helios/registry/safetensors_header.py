"""A strict reader of safetensors headers, without the tensors.

A safetensors file is 8 bytes of header length (little-endian), a JSON header, and the tensors' bytes. Engines map the
file and trust the header, so it must describe the bytes exactly: offsets in the file, back to back, no overlap, no
hole, sizes that follow from type and shape. Everything this module takes, the safetensors library takes too (a test
holds them together); it is stricter in that duplicate keys and unknown fields are refused.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from helios.registry.strict_json import malformed, parse_object

LENGTH_BYTES: Final = 8
# The library allows 100 MB. Headers of real shards stay below 2 MB; 32 MiB parses in about a second.
MAX_HEADER_BYTES: Final = 32 << 20
_MAX_DIMENSIONS: Final = 64
_MAX_UINT64: Final = (1 << 64) - 1

# Bits of an element. Source: safetensors 0.8, enum Dtype.
DTYPE_BITS: Final[dict[str, int]] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: ``begin`` and ``end`` (exclusive) count from the first byte after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def element_count(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return _product(self.shape)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors of a file in the order of their bytes."""

    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]

    def bytes_by_dtype(self) -> Counter[str]:
        """Returns how many bytes each type takes."""
        result: Counter[str] = Counter()
        for tensor in self.tensors:
            result[tensor.dtype] += tensor.end - tensor.begin
        return result


def header_length(prefix: bytes, file_bytes: int, what: str) -> int:
    """Returns the length of a file's JSON header.

    Args:
        prefix: The file's first 8 bytes; fewer if the file is shorter.
        file_bytes: Size of the file.
        what: The file's name, for messages.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT, when the length is not there, too large, or beyond the file.
    """
    if len(prefix) < LENGTH_BYTES:
        raise malformed(f"{what} is cut short: {len(prefix)} bytes are no safetensors file")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise malformed(f"{what} is not a safetensors file: it claims a header of {length} bytes")
    if LENGTH_BYTES + length > file_bytes:
        raise malformed(f"{what} is cut short: its header of {length} bytes ends beyond the file's {file_bytes} bytes")
    return length


def parse_header(document: bytes, file_bytes: int, what: str) -> SafetensorsHeader:
    """Reads a header and checks that it describes the file exactly.

    Args:
        document: The JSON header, as long as ``header_length`` said.
        file_bytes: Size of the whole file.
        what: The file's name, for messages.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT, with what is wrong and the tensor it is wrong about.
    """
    if not document.startswith(b"{"):
        raise malformed(f"{what}: the header does not begin with '{{'")
    content = parse_object(document, f"the header of {what}")
    metadata = _read_metadata(content.pop("__metadata__", {}), what)
    tensors = sorted(
        (_read_tensor(name, value, what) for name, value in content.items()),
        key=lambda tensor: (tensor.begin, tensor.end),
    )
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            fault = "overlaps the tensor before it" if tensor.begin < position else "leaves a hole before it"
            raise malformed(f"{what}: tensor {_show(tensor.name)} {fault} (begins at {tensor.begin}, not {position})")
        position = tensor.end
    data_bytes = file_bytes - LENGTH_BYTES - len(document)
    if position != data_bytes:
        fault = "is cut short" if position > data_bytes else "has bytes that belong to no tensor"
        raise malformed(
            f"{what} {fault}: the header describes {position} bytes of tensors, the file holds {data_bytes}"
        )
    return SafetensorsHeader(tuple(tensors), metadata)


def _read_metadata(value: Any, what: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise malformed(f"{what}: __metadata__ is not a map of strings")
    return value


def _read_tensor(name: str, value: Any, what: str) -> Tensor:
    where = f"{what}: tensor {_show(name)}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise malformed(f"{where} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise malformed(f"{where} has the unknown type {str(dtype)[:50]!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise malformed(f"{where} has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise malformed(f"{where} has data_offsets that are not [begin, end]")
    bits = _checked_product((*shape, DTYPE_BITS[dtype]), where)
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise malformed(
            f"{where} lies about its size: {dtype}{list(shape)} takes {bits / 8:g} bytes,"
            f" its offsets say {offsets[1] - offsets[0]}"
        )
    return Tensor(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_UINT64 for item in value)


def _checked_product(factors: tuple[int, ...], where: str) -> int:
    """Multiplies in order, as readers in 64 bits do: a step that overflows is refused even if a later factor is 0."""
    result = 1
    for factor in factors:
        result *= factor
        if result > _MAX_UINT64:
            raise malformed(f"{where} has a shape whose size overflows 64 bits")
    return result


def _product(factors: tuple[int, ...]) -> int:
    result = 1
    for factor in factors:
        result *= factor
    return result


def _show(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:100] + "…")
