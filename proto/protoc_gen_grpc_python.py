"""protoc plugin that runs the grpc_python generator of grpcio-tools.

buf can call built-in generators of protoc (``protoc_builtin``) but not ``grpc_python``, which exists only inside
grpcio-tools. The request that buf sends is a complete descriptor set, which protoc takes as input with
``--descriptor_set_in``; what it writes goes back to buf as the response.
"""

import sys
import tempfile
from pathlib import Path

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc


def main() -> int:
    request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
    response = CodeGeneratorResponse(supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL)
    with tempfile.TemporaryDirectory() as scratch:
        descriptors = Path(scratch, "descriptors.pb")
        descriptors.write_bytes(FileDescriptorSet(file=request.proto_file).SerializeToString())
        out = Path(scratch, "out")
        out.mkdir()
        options = [f"--descriptor_set_in={descriptors}", f"--grpc_python_out={out}"]
        status: int = protoc.main(["protoc", *options, *request.file_to_generate])
        if status != 0:
            response.error = f"grpc_python failed with status {status}"
        for path in sorted(out.rglob("*.py")):
            response.file.add(name=path.relative_to(out).as_posix(), content=path.read_text())
    sys.stdout.buffer.write(response.SerializeToString())
    return 0


if __name__ == "__main__":
    sys.exit(main())
