"""Every call has an end: one per cent of requests that hang for ever is what users of others count."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from helios.mesh.envoy import rest

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = ("mesh", "proxy", "registry", "storage", "worker")
# As long as it takes to read a node's disks; its caller says when it has waited enough.
WITHOUT_END = {"Scrub"}


class RpcCall(NamedTuple):
    """A call of a stub in the sources."""

    place: str
    name: str
    has_timeout: bool


def conversations() -> set[str]:
    """RPCs that go on for as long as both sides are there: sessions and watches. Pings end those with nobody there."""
    methods = [m for file in rest.descriptor_set().file for service in file.service for m in service.method]
    return {m.name for m in methods if m.client_streaming or (m.server_streaming and m.name.startswith("Watch"))}


def rpc_calls() -> Iterator[RpcCall]:
    """Yields the calls of stubs, which `dialer.stub(…)` gives or whose name says so."""
    names = {m.name for file in rest.descriptor_set().file for service in file.service for m in service.method}
    for component in COMPONENTS:
        for path in (ROOT / component / "helios").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if node.func.attr in names and "stub" in ast.unparse(node.func.value).lower():
                    keywords = {keyword.arg for keyword in node.keywords}
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    # `**options` holds it, as its author says.
                    yield RpcCall(place, node.func.attr, bool(keywords & {"timeout", None}))


def test_every_call_has_a_deadline_but_conversations() -> None:
    calls = list(rpc_calls())
    assert len(calls) >= 80, "they are found no more"
    endless = [call for call in calls if not call.has_timeout and call.name not in conversations() | WITHOUT_END]
    assert endless == []
