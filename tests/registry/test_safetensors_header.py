"""safetensors headers: every lie is refused, and nothing is taken that the safetensors library would not take."""

import json
import struct
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

from helios.mesh.errors import InvalidRequest
from helios.registry.safetensors_header import (
    MAX_HEADER_BYTES,
    SafetensorsHeader,
    header_length,
    parse_header,
)

Header = dict[str, Any]
GOOD: Header = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}
DATA_BYTES = 24


def parse(file: bytes) -> SafetensorsHeader:
    """Reads a file as the registry does."""
    length = header_length(file[:8], len(file), "x.safetensors")
    return parse_header(file[8 : 8 + length], len(file), "x.safetensors")


def build(header: Header | bytes, data_bytes: int = DATA_BYTES) -> bytes:
    """Returns a file with this header."""
    document = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(document)) + document + bytes(data_bytes)


def changed(name: str, **fields: Any) -> Header:
    """Returns GOOD with fields of one tensor replaced."""
    return GOOD | {name: GOOD[name] | fields}


def is_taken_by_library(file: bytes) -> bool:
    try:
        safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return False
    return True


def is_taken_by_us(file: bytes) -> bool:
    try:
        parse(file)
    except InvalidRequest:
        return False
    return True


def test_reads_what_the_library_writes() -> None:
    written: dict[str, NDArray[Any]] = {
        "w": np.zeros((3, 5), np.float16),
        "v": np.zeros((2,), np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }
    header = parse(save(written, metadata={"format": "np"}))
    assert {tensor.name: (tensor.shape, tensor.end - tensor.begin) for tensor in header.tensors} == {
        "w": ((3, 5), 30),
        "v": ((2,), 16),
        "empty": ((0, 4), 0),
    }
    assert header.metadata == {"format": "np"}


LIES: dict[str, tuple[bytes, str]] = {
    "offsets beyond the file": (build(changed("b", data_offsets=[16, 32], shape=[8])), "cut short"),
    "a tensor on top of another": (build(changed("b", data_offsets=[8, 16])), "overlaps"),
    "a hole between tensors": (build(changed("b", data_offsets=[20, 28]), 28), "hole"),
    "a hole before the first": (build({"a": GOOD["a"] | {"data_offsets": [8, 24]}}), "hole"),
    "bytes after the last": (build(GOOD, 25), "belong to no tensor"),
    "a shape too large for its bytes": (build(changed("a", shape=[200, 2])), "lies about its size"),
    "a type too small for its bytes": (build(changed("a", dtype="F16")), "lies about its size"),
    "an end before its begin": (build(changed("b", data_offsets=[24, 16])), "data_offsets"),
    "a negative offset": (build(changed("a", data_offsets=[-16, 0])), "data_offsets"),
    "a negative size": (build(changed("a", shape=[-2, -2])), "shape"),
    "an overflowing shape": (build(changed("a", shape=[1 << 62, 1 << 62, 0])), "overflows"),
    "a shape of floats": (build(changed("a", shape=[2.0, 2.0])), "shape"),
    "a shape of booleans": (build(changed("a", shape=[True, 4])), "shape"),
    "an unknown type": (build(changed("a", dtype="F31")), "unknown type"),
    "a tensor that is not an object": (build(GOOD | {"a": [1]}), "exactly"),
    "a tensor with more fields": (build(changed("a", pickle="x")), "exactly"),
    "a tensor twice": (build(json.dumps(GOOD).replace('"b"', '"a"').encode()), "twice"),
    "metadata that is no map of strings": (build(GOOD | {"__metadata__": {"a": 1}}), "__metadata__"),
    "NaN": (build(b'{"a": NaN}'), "not valid JSON"),
    "no JSON": (build(b"{not json"), "not valid JSON"),
    "a list": (build(b"[1, 2]"), "does not begin"),
    "no UTF-8": (build(b'{"\xff": 1}'), "not valid JSON"),
    "deep nesting": (build(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "not valid JSON"),
    "a length beyond the file": (struct.pack("<Q", 500) + b"{}", "ends beyond"),
    "a huge length": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "claims a header"),
    "the largest length": (b"\xff" * 8 + b"{}", "claims a header"),
    "no length": (b"\x02\x00\x00", "cut short"),
    "nothing": (b"", "cut short"),
    "no header": (struct.pack("<Q", 0), "does not begin"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_refuses_a_lying_header(lie: str) -> None:
    file, message = LIES[lie]
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse(file)
    assert caught.value.reason == "UNSUPPORTED_FORMAT"


def test_the_good_header_of_these_tests_is_good() -> None:
    assert is_taken_by_us(build(GOOD))
    assert is_taken_by_library(build(GOOD))


numbers = st.one_of(st.integers(-2, 40), st.sampled_from([1 << 31, 1 << 63, (1 << 64) - 1, 1 << 64]), st.floats(0, 4))
wrong = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=3), st.lists(numbers, max_size=3))
tensor = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F64", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "X"]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.one_of(
            st.tuples(st.integers(0, 32), st.integers(0, 32)).map(list), st.lists(numbers, max_size=3)
        ),
    }
)


@st.composite
def mutated_headers(draw: st.DrawFn) -> bytes:
    """Returns a file whose header was good before one to three things were changed."""
    header: Header = json.loads(json.dumps(GOOD))
    data_bytes = DATA_BYTES
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(["a", "b", "c", "__metadata__"]))
        match draw(st.integers(0, 4)):
            case 0:
                header[name] = draw(tensor)
            case 1 if isinstance(header.get(name), dict):
                header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(wrong)
            case 2:
                header[name] = draw(wrong)
            case 3:
                header.pop(name, None)
            case _:
                data_bytes = draw(st.integers(0, 40))
    return build(header, data_bytes)


@given(mutated_headers())
@settings(max_examples=400)
def test_takes_nothing_that_the_library_refuses(file: bytes) -> None:
    if is_taken_by_us(file):
        assert is_taken_by_library(file)


@given(st.integers(0, len(build(GOOD)) - DATA_BYTES - 1), st.integers(0, 255))
@settings(max_examples=400)
def test_a_flipped_byte_never_gets_past_us_and_not_past_the_library(position: int, value: int) -> None:
    file = bytearray(build(GOOD))
    file[position] = value
    if is_taken_by_us(bytes(file)):
        assert is_taken_by_library(bytes(file))


@given(st.integers(0, len(build(GOOD)) - 1))
def test_a_file_cut_anywhere_is_refused(length: int) -> None:
    assert not is_taken_by_us(build(GOOD)[:length])


shapes = st.lists(st.integers(0, 5), max_size=3)


@given(st.dictionaries(st.text(max_size=5), st.tuples(st.sampled_from(["F32", "BF16", "U8"]), shapes), max_size=5))
def test_takes_every_honest_header(tensors: dict[str, tuple[str, list[int]]]) -> None:
    header: Header = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if name == "__metadata__":
            continue
        size = int(np.prod(shape, dtype=np.int64)) * {"F32": 4, "BF16": 2, "U8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    file = build(header, end)
    assert is_taken_by_library(file)
    assert {found.name for found in parse(file).tensors} == header.keys()
