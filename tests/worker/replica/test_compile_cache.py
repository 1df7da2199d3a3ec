"""The key of compiled code: equal for equal inputs, another for each thing that differs."""

import hashlib
import json
from dataclasses import replace

import pytest

from helios.worker.replica.compile_cache import CompileInputs, cache_key, inputs_document, processor_architecture

INPUTS = CompileInputs(
    revision="sha256:" + "5" * 64,
    flags={"dtype": "bfloat16", "max_num_seqs": 64},
    engine_version="0.32.0",
    engine_path="/usr/lib/python3/vllm",
    torch_version="2.13.0+cpu",
    driver="",
    architecture="x86_64-0123456789abcdef",
    thread_count=4,
)


def test_the_order_of_flags_is_nothing() -> None:
    same = replace(INPUTS, flags={"max_num_seqs": 64, "dtype": "bfloat16"})
    assert cache_key(same) == cache_key(INPUTS)
    assert len(cache_key(INPUTS)) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "sha256:" + "6" * 64},
        {"flags": {"dtype": "float16", "max_num_seqs": 64}},
        {"flags": {"dtype": "bfloat16"}},
        {"engine_version": "0.32.1"},
        {"engine_path": "/opt/vllm"},
        {"thread_count": 8},
        {"torch_version": "2.13.1+cpu"},
        {"driver": "570.1"},
        {"architecture": "x86_64-fedcba9876543210"},
        # What moves from one field to the next is not the same.
        {"driver": INPUTS.architecture, "architecture": ""},
    ],
    ids=str,
)
def test_each_thing_that_differs_is_another_key(change: dict[str, object]) -> None:
    assert cache_key(replace(INPUTS, **change)) != cache_key(INPUTS)  # type: ignore[arg-type]


def test_the_key_is_the_digest_of_what_people_read() -> None:
    text = inputs_document(INPUTS)
    assert hashlib.sha256(text.encode()).hexdigest() == cache_key(INPUTS)
    assert json.loads(text)["flags"] == INPUTS.flags


def test_a_processor_is_known_by_its_instruction_sets_in_any_order() -> None:
    first = processor_architecture("x86_64", "processor: 0\nmodel name: A\nflags\t\t: sse avx\nflags\t\t: sse avx\n")
    assert first == processor_architecture("x86_64", "processor: 0\nmodel name: B\nflags\t\t: avx sse\n")
    assert first != processor_architecture("x86_64", "flags\t\t: avx sse avx512f\n")
    assert processor_architecture("aarch64", "Features\t: fp asimd\n") != processor_architecture("aarch64", "")
