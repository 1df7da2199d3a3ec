"""What the REST side knows of the contracts: the descriptor set, and the methods of its paths."""

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Final

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from helios.mesh.errors import InvalidRequest

# What gRPC answers carry beside the answer.
NOT_FOR_REST: Final = (
    "grpc-status",
    "grpc-message",
    "grpc-status-details-bin",
    "grpc-accept-encoding",
    "x-openai-error",
)


def descriptor_path() -> Path:
    """Returns the descriptor set that ``make gen`` writes, google.api included: what the transcoder and reflection
    load.

    Raises:
        InvalidRequest: It is missing from the installation.
    """
    path = Path(str(resources.files("helios.api").joinpath("descriptors.pb")))
    if not path.is_file():
        raise InvalidRequest(f"{path} is missing; run `make gen`, or install the package again")
    return path


def descriptor_set() -> FileDescriptorSet:
    """Returns the descriptors of all contracts."""
    return FileDescriptorSet.FromString(descriptor_path().read_bytes())


def literal_paths(services: Iterable[str]) -> dict[str, frozenset[str]]:
    """Returns the HTTP methods of each path without variables, of the named services."""
    wanted = frozenset(services)
    methods: dict[str, frozenset[str]] = {}
    for file in descriptor_set().file:
        for service in file.service:
            if f"{file.package}.{service.name}" not in wanted:
                continue
            for method in service.method:
                rule = method.options.Extensions[annotations_pb2.http]
                verb = rule.WhichOneof("pattern")
                path = getattr(rule, verb) if verb else ""
                if path and "{" not in path:
                    methods[path] = methods.get(path, frozenset()) | {verb.upper()}
    return methods


def posted_paths(services: Iterable[str]) -> list[str]:
    """Returns the paths that take POST."""
    return sorted(path for path, verbs in literal_paths(services).items() if "POST" in verbs)


def error_filter_source(services: Iterable[str], max_body_bytes: int) -> str:
    """Returns errors.lua with what it has to know in front."""
    lua = resources.files("helios.mesh.envoy").joinpath("errors.lua").read_text(encoding="utf-8")
    names = ", ".join(f'"{name}"' for name in NOT_FOR_REST)
    known = f"local MAX_BODY_BYTES = {max_body_bytes}\nlocal NOT_FOR_REST = {{{names}}}\n"
    return f"{known}{_method_table(services)}{lua}"


def _method_table(services: Iterable[str]) -> str:
    """Returns a Lua table: path → its methods, comma separated. A wrong one is 405, not the transcoder's 404."""
    rows = [f'  ["{path}"] = "{", ".join(sorted(verbs))}",' for path, verbs in sorted(literal_paths(services).items())]
    return "\n".join(["local METHODS = {", *rows, "}", ""])
