"""Writes the REST side of the contracts as an OpenAPI 3.1 document (`make openapi`: build/openapi.json).

It reads the same `google.api.http` annotations that Envoy's transcoder executes, so the document can't differ from what
runs. Field names are the protos' own and values follow the proto3 JSON mapping, as the transcoder is configured.

Why it exists: the known generators (grpc-gateway's, gnostic's) are Go programs that no package of PyPI or npm carries;
PyPI's protoc-gen-openapiv2 holds only the annotations of the first.
"""

import json
import re
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2

from proto.generate import GOOGLEAPIS, ROOT, buf, lay_out_googleapis

Schema = dict[str, Any]
Field = descriptor_pb2.FieldDescriptorProto
Message = descriptor_pb2.DescriptorProto
Method = descriptor_pb2.MethodDescriptorProto

_VARIABLE = re.compile(r"\{([^}=]+)(?:=[^}]*)?\}")
_HTTP_BODY = ".google.api.HttpBody"
# proto3 JSON mapping: integers of 64 bits are strings, bytes are base64.
_SCALARS: dict[int, Schema] = {
    Field.TYPE_DOUBLE: {"type": "number", "format": "double"},
    Field.TYPE_FLOAT: {"type": "number", "format": "float"},
    Field.TYPE_INT32: {"type": "integer", "format": "int32"},
    Field.TYPE_SINT32: {"type": "integer", "format": "int32"},
    Field.TYPE_SFIXED32: {"type": "integer", "format": "int32"},
    Field.TYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    Field.TYPE_FIXED32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    Field.TYPE_INT64: {"type": "string", "format": "int64"},
    Field.TYPE_SINT64: {"type": "string", "format": "int64"},
    Field.TYPE_SFIXED64: {"type": "string", "format": "int64"},
    Field.TYPE_UINT64: {"type": "string", "format": "uint64"},
    Field.TYPE_FIXED64: {"type": "string", "format": "uint64"},
    Field.TYPE_BOOL: {"type": "boolean"},
    Field.TYPE_STRING: {"type": "string"},
    Field.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}
_WELL_KNOWN: dict[str, Schema] = {
    ".google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    ".google.protobuf.Duration": {"type": "string", "pattern": r"^-?\d+(\.\d+)?s$"},
    ".google.protobuf.FieldMask": {"type": "string"},
    ".google.protobuf.Empty": {"type": "object"},
    ".google.protobuf.Struct": {"type": "object"},
    ".google.protobuf.Value": {},
    ".google.protobuf.ListValue": {"type": "array", "items": {}},
    _HTTP_BODY: {"type": "object"},
}
_ERROR: Schema = {
    "description": "An error, as OpenAI's API shapes it.",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def main() -> None:
    """Writes build/openapi.json."""
    lay_out_googleapis(ROOT / "proto", GOOGLEAPIS)
    target = ROOT / "build" / "openapi.json"
    target.write_text(json.dumps(openapi_document(build_descriptors()), indent=2) + "\n")
    print(f"wrote {target.relative_to(ROOT)}")


def build_descriptors() -> descriptor_pb2.FileDescriptorSet:
    """Compiles the contracts with their comments; needs build/googleapis."""
    with tempfile.NamedTemporaryFile(suffix=".binpb") as image:
        buf("build", "--as-file-descriptor-set", "--output", image.name)
        return descriptor_pb2.FileDescriptorSet.FromString(Path(image.name).read_bytes())


def openapi_document(files: descriptor_pb2.FileDescriptorSet) -> Schema:
    """Describes every method that has an HTTP annotation, and the messages that those methods reach."""
    return _Document(files).build()


class _Document:
    """Collects paths first and then the schemas that they refer to, until nothing new is referred to."""

    def __init__(self, files: descriptor_pb2.FileDescriptorSet) -> None:
        self._files = files
        self._messages: dict[str, Message] = {}
        self._enums: dict[str, descriptor_pb2.EnumDescriptorProto] = {}
        self._comments: dict[str, str] = {}
        for file in files.file:
            self._index(file)
        self._wanted: list[str] = []

    def build(self) -> Schema:
        paths: dict[str, Schema] = {}
        tags = []
        for file in self._files.file:
            for service in file.service:
                name = f".{file.package}.{service.name}"
                operations = [(method, rule) for method in service.method if (rule := _http_rule(method)) is not None]
                if operations:
                    tags.append({"name": service.name, "description": self._comments.get(name, "")})
                for method, rule in operations:
                    verb, path = _route(rule)
                    operation = self._operation(service.name, f"{name}.{method.name}", method, rule)
                    paths.setdefault(_VARIABLE.sub(r"{\1}", path), {})[verb] = operation
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        info = {"title": "Helios", "version": project["version"], "description": project["description"]}
        components = {"schemas": {"Error": _ERROR, **self._schemas()}}
        return {"openapi": "3.1.0", "info": info, "tags": tags, "paths": paths, "components": components}

    def _operation(self, service: str, name: str, method: Method, rule: http_pb2.HttpRule) -> Schema:
        request = self._messages[method.input_type]
        in_path = _VARIABLE.findall(_route(rule)[1])
        comment = self._comments.get(name, "")
        operation: Schema = {
            "operationId": f"{service}_{method.name}",
            "tags": [service],
            "summary": re.split(r"(?<=\.)\s", comment, maxsplit=1)[0],
            "description": comment,
            "parameters": list(self._parameters(method.input_type, in_path, with_query=rule.body != "*")),
            "responses": {
                "200": {"description": "Success.", "content": self._response(method, rule)},
                "default": {
                    "description": "An error.",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
        }
        if rule.body:
            whole = rule.body == "*"
            schema = self._message(request, method.input_type, without=in_path) if whole else {}
            if whole and method.input_type == _HTTP_BODY:
                schema = {"type": "object", "description": "The JSON body of OpenAI's API."}
            elif not whole:
                schema = self._field(next(field for field in request.field if field.name == rule.body))
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        return operation

    def _parameters(self, message: str, in_path: list[str], *, with_query: bool) -> Iterator[Schema]:
        for field in self._messages[message].field:
            is_path = field.name in in_path
            # Messages in a query (nested names with dots) are not used by these contracts.
            if is_path or (with_query and field.type != Field.TYPE_MESSAGE):
                yield {
                    "name": field.name,
                    "in": "path" if is_path else "query",
                    "required": is_path,
                    "description": self._comments.get(f"{message}.{field.name}", ""),
                    "schema": self._field(field),
                }

    def _response(self, method: Method, rule: http_pb2.HttpRule) -> Schema:
        if method.output_type == _HTTP_BODY:
            events = {"type": "string", "description": "Server-sent events, when the request asks for a stream."}
            return {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": events}}
        schema = self._reference(method.output_type)
        if rule.response_body:
            fields = self._messages[method.output_type].field
            schema = self._field(next(field for field in fields if field.name == rule.response_body))
        if method.server_streaming:
            schema = {"type": "array", "items": schema, "description": "One element for each message, as it comes."}
        return {"application/json": {"schema": schema}}

    def _schemas(self) -> Schema:
        done: Schema = {}
        while self._wanted:
            name = self._wanted.pop()
            key = _component(name)
            if key in done:
                continue
            if name in self._enums:
                values = [value.name for value in self._enums[name].value]
                done[key] = {"type": "string", "enum": values, "description": self._comments.get(name, "")}
            else:
                done[key] = self._message(self._messages[name], name, without=[])
        return dict(sorted(done.items()))

    def _message(self, message: Message, name: str, *, without: list[str]) -> Schema:
        properties = {}
        for field in message.field:
            if field.name not in without:
                comment = self._comments.get(f"{name}.{field.name}", "")
                properties[field.name] = {**self._field(field), "description": comment}
        return {"type": "object", "description": self._comments.get(name, ""), "properties": properties}

    def _field(self, field: Field) -> Schema:
        if field.type not in (Field.TYPE_MESSAGE, Field.TYPE_ENUM):
            schema = _SCALARS[field.type]
        elif field.type == Field.TYPE_MESSAGE and self._messages[field.type_name].options.map_entry:
            value = self._messages[field.type_name].field[1]
            return {"type": "object", "additionalProperties": self._field(value)}
        else:
            schema = self._reference(field.type_name)
        if field.label == Field.LABEL_REPEATED:
            return {"type": "array", "items": schema}
        return dict(schema)

    def _reference(self, name: str) -> Schema:
        if name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[name])
        self._wanted.append(name)
        return {"$ref": f"#/components/schemas/{_component(name)}"}

    def _index(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        """Finds all messages, enums and comments of a file by their full names."""
        for message in file.message_type:
            self._index_message(f".{file.package}.{message.name}", message)
        for enum in file.enum_type:
            self._enums[f".{file.package}.{enum.name}"] = enum
        for location in file.source_code_info.location:
            name = _name_at(file, list(location.path))
            if name is not None and location.leading_comments:
                self._comments[name] = " ".join(location.leading_comments.split())

    def _index_message(self, name: str, message: Message) -> None:
        self._messages[name] = message
        for nested in message.nested_type:
            self._index_message(f"{name}.{nested.name}", nested)
        for enum in message.enum_type:
            self._enums[f"{name}.{enum.name}"] = enum


def _name_at(file: descriptor_pb2.FileDescriptorProto, path: list[int]) -> str | None:
    """Translates a path of SourceCodeInfo (pairs of field number and index) to a full name.

    Source: descriptor.proto, `SourceCodeInfo.Location.path`.
    """
    if len(path) % 2:
        return None
    node: Any = file
    name = f".{file.package}"
    for number, index in zip(path[::2], path[1::2], strict=True):
        field = node.DESCRIPTOR.fields_by_number[number]
        if field.name not in ("message_type", "enum_type", "service", "nested_type", "field", "method", "value"):
            return None
        node = getattr(node, field.name)[index]
        name = f"{name}.{node.name}"
    return name


def _http_rule(method: Method) -> http_pb2.HttpRule | None:
    extension = annotations_pb2.http
    return method.options.Extensions[extension] if method.options.HasExtension(extension) else None


def _route(rule: http_pb2.HttpRule) -> tuple[str, str]:
    """Returns the HTTP method, in lower case, and the path template of a rule."""
    verb = rule.WhichOneof("pattern")
    if verb is None or verb == "custom":
        raise ValueError(f"an HTTP rule without a plain method: {rule}")
    return verb, getattr(rule, verb)


def _component(name: str) -> str:
    """Shortens `.helios.api.fleet.v1.Replica` to `fleet.v1.Replica`."""
    return name.removeprefix(".").removeprefix("helios.api.")


if __name__ == "__main__":
    main()
