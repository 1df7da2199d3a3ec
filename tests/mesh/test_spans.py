"""Spans against a set of bytes."""

import itertools

import hypothesis.strategies as st
from hypothesis import given

from helios.mesh.transfer.spans import Spans

PLACE = st.integers(0, 40)
SPAN = st.tuples(PLACE, PLACE)


@given(st.lists(SPAN, max_size=12), SPAN)
def test_spans_are_the_bytes_that_were_added(added: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    spans = Spans(added)
    here = {byte for start, end in added for byte in range(start, end)}
    wanted = set(range(*asked))
    assert {byte for start, end in spans for byte in range(start, end)} == here
    assert sum(end - start for start, end in spans) == len(here)
    assert spans.covers(*asked) == (wanted <= here)
    assert spans.overlaps(*asked) == bool(wanted & here)
    found = list(spans)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(found)), "neighbours are one"
    assert len(spans) == len(found)
