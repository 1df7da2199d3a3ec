"""Chunks cover a blob, begin with its tensors, and find what two models share."""

import hypothesis.strategies as st
from hypothesis import given

from helios.registry.chunks import CHUNK_BYTES, plan_chunks, tensor_starts
from helios.registry.safetensors_header import SafetensorsHeader, Tensor


@given(size=st.integers(0, 40 << 20), starts=st.lists(st.integers(0, 50 << 20), unique=True, max_size=20))
def test_chunks_cover_a_blob_and_none_is_too_large(size: int, starts: list[int]) -> None:
    lengths = plan_chunks(size, sorted(starts))
    assert sum(lengths) == size
    assert all(0 < length <= CHUNK_BYTES for length in lengths)


@given(sizes=st.lists(st.integers(64 << 10, 10 << 20), min_size=1, max_size=10), header=st.integers(1, 1 << 20))
def test_every_tensor_of_some_size_begins_a_chunk(sizes: list[int], header: int) -> None:
    starts = [header]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    lengths = plan_chunks(header + sum(sizes), starts)
    offsets = {sum(lengths[:index]) for index in range(len(lengths))}
    assert set(starts) <= offsets


def test_what_is_no_safetensors_file_is_cut_evenly() -> None:
    assert plan_chunks(2 * CHUNK_BYTES + 1) == [CHUNK_BYTES, CHUNK_BYTES, 1]
    assert plan_chunks(0) == []


def test_small_tensors_side_by_side_share_a_chunk() -> None:
    starts = [100 + 1000 * index for index in range(10)]
    assert plan_chunks(100 + 10_000, starts) == [10_100]


def test_a_longer_header_moves_no_tensor_out_of_its_chunk() -> None:
    sizes = [5 << 20, 1 << 20, 9 << 20]
    tensors = []
    at = 0
    for number, size in enumerate(sizes):
        tensors.append(Tensor(str(number), "U8", (size,), at, at + size))
        at += size
    header = SafetensorsHeader(tuple(tensors), {})
    plans = [plan_chunks(8 + length + at, tensor_starts(header, length)) for length in (1000, 70_000)]
    assert plans[0][1:] == plans[1][1:]
    assert (plans[0][0], plans[1][0]) == (1008, 70_008)
