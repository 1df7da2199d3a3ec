"""Names: what is taken, what is refused."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helios.mesh.errors import InvalidRequest
from helios.registry.names import MAX_ALIASES, check_aliases, check_name


@pytest.mark.parametrize("name", ["a", "7b", "meta-llama/Llama-3.1-8B", "a.b_c-d", "a" * 200, "A/b/c"])
def test_takes_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-a",
        ".a",
        "/a",
        "a/",
        "a//b",
        "a/../b",
        "a/./b",
        "a b",
        "a\n",
        "a:b",
        "ä",
        "a" * 201,
        "٣",
        "a\x00",
        "a?b",
        "..",
        "a%2e",
    ],
)
def test_refuses_names(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_name(name)
    assert caught.value.reason == "INVALID_MODEL_NAME"


@given(st.text(max_size=12))
@example("a/b\n")
def test_a_name_is_safe_in_a_path_and_a_header(name: str) -> None:
    try:
        check_name(name)
    except InvalidRequest:
        return
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", name)
    assert not {"", ".", ".."} & set(name.split("/"))


def test_aliases_are_sorted_and_unique() -> None:
    assert check_aliases("m", ("b", "a", "b")) == ("a", "b")


def test_refuses_its_own_name_as_alias_and_too_many() -> None:
    with pytest.raises(InvalidRequest, match="itself"):
        check_aliases("m", ("m",))
    with pytest.raises(InvalidRequest, match="at most"):
        check_aliases("m", tuple(f"a{number}" for number in range(MAX_ALIASES + 1)))
