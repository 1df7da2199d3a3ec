"""What a peer benchmark reads from: BlobService as agents serve it, and a bare gRPC stream, both with mTLS.

Run as a process of its own: `python -m tests.benchmarks.peer_server BLOB HASH IDENTITY`; it prints both addresses, and
ends with its standard input.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop

from helios.mesh.identity import IdentityFiles
from helios.mesh.server import MeshServer
from helios.storage.blob_servicer import PIECE_BYTES, SERVICE_NAME, BlobServicer

BARE_METHOD = "/bench.Bare/Read"


async def main(path: Path, hash_: str, identity: IdentityFiles) -> None:
    """Serves until standard input ends."""
    policy = {SERVICE_NAME: frozenset({"storage"})}
    async with BlobServicer(lambda wanted: [path] if wanted == hash_ else [], max_reads=64) as blobs:
        server = MeshServer(listen="127.0.0.1:0", identity=identity, policy=policy)
        blobs.add_to(server.grpc)
        server.serve(SERVICE_NAME)
        async with server:
            bare, port = _bare(path, identity)
            await bare.start()
            print(server.address, f"127.0.0.1:{port}", flush=True)
            await asyncio.to_thread(sys.stdin.read)
            await bare.stop(0)


def _bare(path: Path, identity: IdentityFiles) -> tuple[grpc.aio.Server, int]:
    async def read(_: bytes, __: Any) -> AsyncIterator[bytes]:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for offset in range(0, size, PIECE_BYTES):
                yield os.pread(file.fileno(), PIECE_BYTES, offset)

    handlers: Any = {"Read": grpc.unary_stream_rpc_method_handler(read)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bare", handlers),))
    pem = identity.read()
    credentials = grpc.ssl_server_credentials([(pem.key, pem.certificate)], pem.ca, require_client_auth=True)
    return server, server.add_secure_port("127.0.0.1:0", credentials)


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), sys.argv[2], IdentityFiles(Path(sys.argv[3]))))
