"""What is read of JSON bodies without a parser (`lift.lua`), run in LuaJIT, beside what a parser reads."""

import json
from functools import cache
from importlib import import_module
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.envoy import filters
from helios.mesh.names import ANSWER_FIELDS, METADATA_NAMESPACE, MODEL_KEY, SESSION_FIELDS, TIER_FIELD

# Its stubs know of strings only, and bodies are bytes.
luajit: Any = import_module("lupa.luajit21")
WANTED: Final = (MODEL_KEY, *SESSION_FIELDS, *ANSWER_FIELDS, TIER_FIELD)
_ENVOY: Final = rb"""
function lift(text)
  local found = {}
  local body = {
    length = function() return #text end,
    getBytes = function(_, from, count) return string.sub(text, from + 1, from + count) end,
  }
  local metadata = {set = function(_, namespace, name, value) found[namespace .. ":" .. name] = value end}
  envoy_on_request({
    body = function() return text ~= nil and body or nil end,
    streamInfo = function() return {dynamicMetadata = function() return metadata end} end,
  })
  return found
end
"""


@cache
def lua(*, jit: bool = True) -> Any:
    """LuaJIT with the script that the filter has."""
    source = filters.reader().default_source_code
    assert source is not None
    assert source.inline_string is not None
    runtime = luajit.LuaRuntime(encoding=None)
    if not jit:
        runtime.execute(b"jit.off()")
    runtime.execute(source.inline_string.encode())
    runtime.execute(_ENVOY)
    return runtime


def lift(text: bytes | None) -> dict[str, Any]:
    """The metadata that the script sets; the same with LuaJIT's compiler and without."""
    found, again = (dict(lua(jit=jit).globals()[b"lift"](text)) for jit in (True, False))
    assert found == again
    start = f"{METADATA_NAMESPACE}:"
    named = {name.decode(): value for name, value in found.items()}
    assert all(name.startswith(start) for name in named)
    return {
        name.removeprefix(start): value.decode() if isinstance(value, bytes) else value for name, value in named.items()
    }


def ordinary(document: dict[str, Any]) -> dict[str, Any] | None:
    """What is to be read of a body; None where that is left to a parser."""
    found: dict[str, Any] = {name: document[name] for name in WANTED if name in document}
    if MODEL_KEY not in found or not all(map(_is_ordinary, found.values())):
        return None
    return found


def _is_ordinary(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= 256 and value.isascii() and value.isprintable() and not set(value) & {'"', "\\"}
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**15


_names = st.sampled_from(WANTED)
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | _names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | _names, inner, max_size=4),
    max_leaves=12,
)
# With all that means something to JSON, but for what it escapes.
_plain = st.text("abcXYZ019 /.-_:{}[],'", min_size=1, max_size=12)
_other_names = st.text("abc{}[]:, é", max_size=5)


@st.composite
def _bodies(draw: st.DrawFn, values: st.SearchStrategy[Any], names: st.SearchStrategy[str]) -> dict[str, Any]:
    document = draw(st.dictionaries(_names, values, max_size=5)) | {MODEL_KEY: draw(values)}
    document |= draw(st.dictionaries(names, _values, max_size=5))
    return dict(draw(st.permutations(list(document.items()))))


@given(
    document=_bodies(_plain | st.integers(1, 10**15 - 1), _other_names),
    indent=st.sampled_from([None, 0, 2, "\t"]),
    separators=st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : "), ("\r\n,", "\t:")]),
)
def test_of_ordinary_bodies_it_reads_what_a_parser_reads(
    document: dict[str, Any], indent: int | str | None, separators: tuple[str, str]
) -> None:
    wanted = ordinary(document)
    assert wanted is not None
    text = json.dumps(document, ensure_ascii=False, indent=indent, separators=separators)
    assert lift(text.encode()) == wanted
    assert lift(f" \r\n\t{text}\n ".encode()) == wanted


@given(document=_bodies(_values, st.text(max_size=5)), ensure_ascii=st.booleans())
def test_whatever_it_reads_a_parser_reads_too(document: dict[str, Any], ensure_ascii: bool) -> None:
    text = json.dumps(document, ensure_ascii=ensure_ascii).encode(errors="surrogatepass")
    assert lift(text) in ({}, ordinary(json.loads(text)))


@given(document=_bodies(_plain, _other_names), data=st.data())
def test_of_damaged_bodies_it_reads_what_a_parser_reads_or_nothing(
    document: dict[str, Any], data: st.DataObject
) -> None:
    text = json.dumps(document, ensure_ascii=False).encode()
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = data.draw(
        st.sampled_from([text[:at], text[:at] + text[at + 1 :], text[:at] + text[at:][::-1]])
        | st.sampled_from(
            [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b".", b"e", b"\n", b"\0", b"\xff"]
        ).map(lambda more: text[:at] + more + text[at:])
    )
    if found := lift(damaged):
        parsed = _parse(damaged.decode(errors="replace"))
        if isinstance(parsed, _Pairs):
            assert found == ordinary(parsed.document)
            assert all(parsed.names.count(name) == 1 for name in found)
        else:
            # Within a text it is not looked for what is wrong, but for line feeds.
            assert parsed.msg.startswith(("Invalid \\", "Invalid control character"))
            assert parsed.doc[parsed.pos] != "\n"


def _parse(text: str) -> "_Pairs | json.JSONDecodeError":
    try:
        found: _Pairs = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        return error
    return found


class _Pairs:
    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.document = dict(pairs)
        self.names = [name for name, _ in pairs]


@pytest.mark.parametrize(
    "body",
    [
        None,
        b"",
        b" ",
        b"{}",
        b"[]",
        b"null",
        b"7",
        b'"model"',
        b'["model","m"]',
        b'[{"model":"m"}]',
        b'{"x":{"model":"m"}}',
        b'{"x":[{"model":"m"}]}',
        b'{"x":"\\"model\\":\\"m\\""}',
        b'{"model":""}',
        b'{"model":null}',
        b'{"model":true}',
        b'{"model":["m"]}',
        b'{"model":{"model":"m"}}',
        b'{"model":0}',
        b'{"model":-7}',
        b'{"model":07}',
        b'{"model":7.0}',
        b'{"model":7e3}',
        b'{"model":1000000000000000}',
        b'{"model":"a\\/b"}',
        b'{"model":"\\u006d"}',
        b'{"mode\\u006c":"m"}',
        b'{"model":"m","mode\\u006c":"n"}',
        '{"model":"é"}'.encode(),
        b'{"model":"m\n"}',
        b'{"model":"m\0"}',
        b'{"model":"' + b"m" * 257 + b'"}',
        b'{"model":"m","model":"n"}',
        b'{"model":"m","model":"m"}',
        b'{"model":"m","user":null}',
        b'{"model":"m","max_tokens":1.5}',
        b'{"max_tokens":5}',
        b'\xef\xbb\xbf{"model":"m"}',
        b'{"model":"m"',
        b'{"model":"m"}}',
        b'{"model":"m"}{}',
        b'{"model":"m",}',
        b'{,"model":"m"}',
        b'{"model":"m" "n":1}',
        b'{"model" "m"}',
        b"{model:7}",
        b'{"model":}',
        b'{"model":"m","x":}',
        b'{"model":"m","x":nil}',
        b'{"model":"m","x":[1}}',
        b'{"model":"m","x":[1,]}',
        b'{"model":"m","x":[,1]}',
        b'{"model":"m","x":[1 2]}',
        b'{"model":"m","x":{"y"}}',
        b'{"model":"m","x":{"y":1,}}',
        b'{"model":"m","x":{1:2}}',
        b'{"model":"m","x":["y":1]}',
        b'{"model":"m","x":[tru]}',
        b'{"model":"m","x":[truex]}',
        b'{"model":"m","x":[01]}',
        b'{"model":"m","x":[.5]}',
        b'{"model":"m","x":[1.]}',
        b'{"model":"m","x":[1e]}',
        b'{"model":"m","x":[+1]}',
        b'{"model":"m","x":[-]}',
        b'{"model":"m","x":NaN}',
        b'{"model":"m","x":"two\nlines"}',
        b'{"model":"m","x":{"two\nlines":1}}',
        b'{"model":"m"' + b',"":1' * 256 + b"}",
        b'{"model":"m","x":[1,"2]}',
        b'{"model":"m","x":"\\"}',
        b'{"model":"m","x":' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"model":"m","x":[0' + b",0" * 9998 + b"]}",
        b'{"model":"m","x":"' + b"x" * 4 * 1024 * 1024 + b'"}',
    ],
    ids=lambda body: repr(body)[:40],
)
def test_what_is_out_of_the_ordinary_is_left_to_a_parser(body: bytes | None) -> None:
    assert lift(body) == {}


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"model":"m"}', {"model": "m"}),
        (b'{"model":7}', {"model": 7}),
        (b'{"model":"' + b"m" * 256 + b'"}', {"model": "m" * 256}),
        (b'{"model":"m","max_tokens":999999999999999}', {"model": "m", "max_tokens": 999_999_999_999_999}),
        (b'{"x":"\\\\","model":"m"}', {"model": "m"}),
        (b'{"x":"\\\\\\"","model":"m"}', {"model": "m"}),
        (b'{"":"","model":"m"}', {"model": "m"}),
        (b'{"Model":"n","model":"m"}', {"model": "m"}),
        (b'{"model":"m","x":' + b"[" * 64 + b"]" * 64 + b"}", {"model": "m"}),
        (b'{"model":"m","x":[0' + b",0" * 9997 + b"]}", {"model": "m"}),
        (b'{"model":"m"' + b',"":1' * 255 + b"}", {"model": "m"}),
        (b'{"model":"m","x":[0,-0.5e+7,1E-2,12.0,true,false,null,{},[],""]}', {"model": "m"}),
        (b'{\n"x":"\\n",\n"model":"m"\n}', {"model": "m"}),
        (b'{"tools":[{"model":"n","max_tokens":9}],"model":"m"}', {"model": "m"}),
        (b'{"model":"org/name:tag","n":2,"user":"u","service_tier":"flex"}', None),
    ],
    ids=lambda body: repr(body)[:40],
)
def test_what_is_ordinary_is_read(body: bytes, wanted: dict[str, Any] | None) -> None:
    assert lift(body) == (json.loads(body) if wanted is None else wanted)


def test_its_time_grows_with_the_body_alone() -> None:
    # What makes a reader slow that looks back, or looks twice: quotes behind backslashes, openings, lines, names.
    seconds = lua().eval(b"function(text) local from = os.clock(); lift(text); return os.clock() - from end")
    for start, part in (
        (b'"', b'\\"'),
        (b'"', b"\\\\"),
        (b"[", b'"",'),
        (b"[", b'"",\n'),
        (b"[", b"[],"),
        (b"[", b"1,"),
        (b"", b"["),
        (b"{", b'"":1,'),
        (b"1,", b'"":1,'),
        (b"1,", b'"":1,\n'),
    ):
        small, large = (b'{"model":"m","x":' + start + part * count for count in (5_000, 160_000))
        quick, slow = (min(seconds(text) for _ in range(5)) for text in (small, large))
        assert slow < 32 * 8 * max(quick, 1e-4), part
