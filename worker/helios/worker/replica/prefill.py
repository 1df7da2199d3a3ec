"""Prefill and decode apart: how a decode replica has a prompt computed elsewhere, and what a prefill replica offers.

The picker names a prefill replica beside the one that answers (``x-helios-prefill-endpoint``). The decode replica's
engine, once it knows the prompt's tokens, asks that replica to compute them and takes the KV cache through vLLM's
connector. Whatever goes wrong on that way costs time, never the request: the decode replica then computes the prompt.
"""

import asyncio
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import grpc.aio
import orjson
import structlog

from helios.api.inference.v1 import prefill_service_pb2 as pb
from helios.api.inference.v1 import prefill_service_pb2_grpc
from helios.mesh.channel import Dialer
from helios.mesh.errors import InvalidRequest, NoReadyReplica
from helios.mesh.identity import IdentityFiles
from helios.mesh.status import error_from_rpc
from helios.worker.replica.engine import TransferParameters
from helios.worker.replica.gate import CallGate
from helios.worker.replica.settings import Role

log = structlog.get_logger()

# A prompt of the longest context takes seconds; what takes longer is better computed here.
_PREFILL_SECONDS: Final = 30.0
# Between the answer of a prefill and the first step of the decode; what is left after it, nobody takes.
_KEPT_SECONDS: Final = 60.0
_TRANSFER: Final = re.compile(r"[0-9a-f]{32}")
# `host:port` of the node network; what the picker sends, and no other target's syntax.
_ENDPOINT: Final = re.compile(r"[0-9A-Za-z.\-\[\]:]{1,255}:[0-9]{1,5}")


class PrefillServicer(prefill_service_pb2_grpc.PrefillServiceServicer):
    """Computes prompts for decode replicas."""

    def __init__(self, engine: Any, gate: CallGate, *, role: Role, revision: str, directory: str) -> None:
        """``directory`` is where KV caches lie that travel through files; empty: they don't."""
        # Not every engine computes prompts for others.
        self._prefill = getattr(engine, "prefill", None)
        self._gate = gate
        self._role = role
        self._revision = revision
        self._directory = directory
        if directory and role is Role.PREFILL:
            _sweep(Path(directory))

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> pb.PrefillResponse:
        """Computes a prompt."""
        with self._gate.admit(context, "prefill", is_prefill=True):
            if self._prefill is None or self._role is not Role.PREFILL or request.revision != self._revision:
                raise NoReadyReplica("this replica computes no prompts of that revision for others")
            if not request.token_ids or not _TRANSFER.fullmatch(request.transfer):
                raise InvalidRequest("a prefill needs a prompt, and a transfer of 32 hexadecimal digits")
            try:
                found = await self._prefill(list(request.token_ids), request.transfer)
            finally:
                if self._directory:
                    path = Path(self._directory, request.transfer)
                    asyncio.get_running_loop().call_later(_KEPT_SECONDS, shutil.rmtree, path, True)
            return pb.PrefillResponse(transfer_parameters=orjson.dumps(found).decode())


class PrefillClient:
    """Asks prefill replicas; keeps one channel for each, in ``stack``, which closes them."""

    def __init__(self, stack: AsyncExitStack, *, identity: IdentityFiles | None, revision: str) -> None:
        self._identity = identity
        self._revision = revision
        self._dialers: dict[str, Dialer] = {}
        self._stack = stack

    async def prefill(self, endpoint: str, token_ids: Sequence[int]) -> TransferParameters | None:
        """Has a prompt computed by the replica at ``endpoint``; None where that can't be."""
        if not _ENDPOINT.fullmatch(endpoint):
            log.warning("not an endpoint", endpoint=endpoint[:100])
            return None
        request = pb.PrefillRequest(revision=self._revision, token_ids=token_ids, transfer=uuid.uuid4().hex)
        try:
            dialer = await self._dialer(endpoint)
            response = await dialer.stub(prefill_service_pb2_grpc.PrefillServiceStub).Prefill(
                request, timeout=_PREFILL_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            log.warning("prefill failed", endpoint=endpoint, reason=error_from_rpc(error).reason)
            return None
        parameters: TransferParameters = orjson.loads(response.transfer_parameters)
        return parameters

    async def _dialer(self, endpoint: str) -> Dialer:
        dialer = self._dialers.get(endpoint)
        if dialer is None:
            dialer = await self._stack.enter_async_context(Dialer(endpoint, identity=self._identity, peer="worker"))
            # Another request may have dialled meanwhile; both channels are closed in the end.
            self._dialers[endpoint] = dialer
        return dialer


def _sweep(directory: Path) -> None:
    """Removes what prefill replicas left that died before they could."""
    for path in directory.glob("*"):
        if time.time() - path.stat().st_mtime > 10 * _KEPT_SECONDS:  # noqa: TID251  files carry the wall clock
            shutil.rmtree(path, ignore_errors=True)
