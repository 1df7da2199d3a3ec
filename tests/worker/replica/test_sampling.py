"""Ranges of sampling parameters."""

import dataclasses
import math
from typing import Any

import pytest

from helios.mesh.errors import InvalidRequest
from helios.worker.replica.engine import Sampling
from helios.worker.replica.sampling import check_sampling


@pytest.mark.parametrize(
    ("field", "allowed", "refused"),
    [
        ("temperature", (0.0, 0.7, 5.0), (-0.1, math.nan, math.inf)),
        ("top_p", (0.01, 1.0), (0.0, 1.01, -1.0)),
        ("top_k", (-1, 0, 1, 1000), (-2,)),
        ("min_p", (0.0, 1.0), (-0.1, 1.1)),
        ("presence_penalty", (-2.0, 2.0), (-2.1, 2.1)),
        ("frequency_penalty", (-2.0, 2.0), (-2.1, 2.1)),
        ("repetition_penalty", (0.1, 1.0), (0.0, -1.0)),
        ("max_tokens", (1, 10_000), (0,)),
        ("min_tokens", (0, 5), (-1,)),
        ("logprobs", (0, 20), (21,)),
        ("n", (1, 128), (0, 129)),
        ("stop", ((), ("a", "b")), (("",), ("a",) * 65)),
        ("stop_token_ids", ((0, 99),), ((100,),)),
    ],
)
def test_each_field_is_checked_and_named(field: str, allowed: tuple[Any, ...], refused: tuple[Any, ...]) -> None:
    for value in allowed:
        check_sampling(dataclasses.replace(Sampling(), **{field: value}), vocabulary_size=100)
    for value in refused:
        with pytest.raises(InvalidRequest) as caught:
            check_sampling(dataclasses.replace(Sampling(), **{field: value}), vocabulary_size=100)
        assert caught.value.metadata["param"] == f"sampling.{field}"


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens"):
        check_sampling(Sampling(min_tokens=5, max_tokens=4), vocabulary_size=100)
    with pytest.raises(InvalidRequest, match="greedy"):
        check_sampling(Sampling(n=2, temperature=0.0), vocabulary_size=100)
