"""Every RPC of every contract is implemented somewhere: what is not built yet is not in the contracts yet."""

import ast
import functools
import re

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from proto.generate import DESCRIPTORS, ROOT

SOURCES = ("proxy", "worker", "storage", "registry", "mesh")


def services() -> dict[str, set[str]]:
    files = FileDescriptorSet.FromString((ROOT / DESCRIPTORS).read_bytes()).file
    return {
        f"{file.package}.{service.name}": {method.name for method in service.method}
        for file in files
        for service in file.service
    }


@functools.cache
def servicers() -> dict[str, list[set[str]]]:
    """Finds the classes that extend a generated servicer, by its name, with the methods that they define.

    Reads the sources instead of importing them: some import vLLM, which takes ten seconds.
    """
    found: dict[str, list[set[str]]] = {}
    for path in (path for source in SOURCES for path in (ROOT / source).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.ClassDef):
                methods = {item.name for item in node.body if isinstance(item, ast.AsyncFunctionDef | ast.FunctionDef)}
                for base in node.bases:
                    name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
                    found.setdefault(name, []).append(methods)
    return found


@functools.cache
def answered_at_once() -> dict[str, set[str]]:
    """Finds the methods that a function answers (`MeshServer.answer_at_once`), by service: modules name both alike."""
    found: dict[str, set[str]] = {}
    for path in (path for source in SOURCES for path in (ROOT / source).rglob("*.py")):
        text = path.read_text()
        service = re.search(r'^SERVICE: Final = "([\w.]+)"$', text, re.MULTILINE)
        method = re.search(r'^METHOD: Final = f"/\{SERVICE\}/(\w+)"$', text, re.MULTILINE)
        if service and method:
            found.setdefault(service[1], set()).add(method[1])
    return found


@pytest.mark.parametrize("service", sorted(services()))
def test_every_rpc_is_implemented(service: str) -> None:
    at_once = [methods for name, methods in answered_at_once().items() if name == service]
    classes = [*servicers().get(f"{service.rpartition('.')[2]}Servicer", []), *at_once]
    assert classes, "no servicer"
    for methods in classes:
        assert services()[service] <= methods, f"missing: {services()[service] - methods}"


def test_nothing_answers_that_it_is_not_implemented() -> None:
    """A placeholder behind a contract is a promise that is not kept."""
    for path in (path for source in SOURCES for path in (ROOT / source).rglob("*.py")):
        assert "raise NotImplementedError" not in path.read_text(), path
