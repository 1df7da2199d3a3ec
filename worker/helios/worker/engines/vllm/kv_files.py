"""KV caches that travel through files of the node: vLLM's ExampleConnector, with an owner and an end for each file.

The example keeps a directory for each prompt it ever saw, named by the prompt's hash, and never removes one. Here each
transfer has a directory of its own, named by the decode replica that asked for it: written by one request, read by
one, and removed by the reader. Only whole blocks travel; the decode replica computes what is left of the prompt itself,
which also gives the first token. Needs no device; between devices NIXL does this.

Loaded by vLLM in EngineCore and in the process that computes (``kv_connector_module_path``). One rank only: ranks would
write the same file.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
    ExampleConnectorMetadata,
    align_to_block_size,
)

TRANSFER: Final = "transfer"


class FileConnector(ExampleConnector):
    """Writes the KV cache of requests with a transfer where this engine produces, reads it where it consumes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_producer: bool = self._kv_transfer_config.is_kv_producer
        self._taken: set[str] = set()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Returns how many tokens of a prompt need not be computed here."""
        transfer = _transfer_of(request.kv_transfer_params)
        # A request that was pre-empted computes its prompt: what it had taken is gone.
        if self._is_producer or not transfer or request.request_id in self._taken:
            return 0, False
        if not Path(self._folder(transfer)).is_dir():
            return 0, False
        token_count = align_to_block_size(len(request.prompt_token_ids or []), self._block_size)
        return max(0, token_count - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Notes that a request takes what was left for it."""
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if num_external_tokens > 0:
            self._taken.add(request.request_id)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Forgets a request."""
        self._taken.discard(request.request_id)
        return False, None

    def build_connector_meta(self, scheduler_output: Any) -> ExampleConnectorMetadata:
        """Says what is written or read in the next step."""
        meta = ExampleConnectorMetadata()
        for new in scheduler_output.scheduled_new_reqs:
            extra = (new.sampling_params.extra_args if new.sampling_params else None) or {}
            transfer = _transfer_of(extra.get("kv_transfer_params"))
            if not transfer or not (self._is_producer or new.req_id in self._requests_need_load):
                continue
            meta.add_request(
                token_ids=new.prompt_token_ids or [],
                block_ids=new.block_ids[0],
                block_size=self._block_size,
                is_store=self._is_producer,
                # The one field of a request that reaches the names of files.
                mm_hashes=[transfer],
            )
        self._requests_need_load.clear()
        return meta

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Reads what this step needs, all layers of it, and removes the files."""
        metadata: Any = self._get_connector_metadata()
        wanted = [request for request in metadata.requests if not request.is_store]
        # A step that computes nothing has no use for what it could read.
        if not wanted or forward_context.attn_metadata is None:
            return
        super().start_load_kv(forward_context, **kwargs)
        for request in wanted:
            shutil.rmtree(self._folder(request.mm_hashes[0]), ignore_errors=True)

    def _generate_foldername_debug(self, token_ids: Any, mm_hashes: Sequence[str], create_folder: bool = False) -> str:
        folder = Path(self._folder(mm_hashes[0]))
        if create_folder:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return str(folder)

    def _folder(self, transfer: str) -> str:
        return f"{self._storage_path}/{transfer}"


def _transfer_of(parameters: dict[str, Any] | None) -> str:
    """Returns the name of a request's transfer, empty without one; nothing that leads to another directory."""
    name = parameters.get(TRANSFER) if isinstance(parameters, dict) else None
    return name if isinstance(name, str) and name.isalnum() else ""
