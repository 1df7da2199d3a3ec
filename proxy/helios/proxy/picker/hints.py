"""What an engine is told of a request, for its queue and its batches: headers from the picker to the replica.

Told is what somebody knows: a band of priority, a key's history, a prompt that was read. Other requests carry nothing,
which costs nothing. Envoy strips these headers from what clients send.
"""

from typing import Final

from helios.mesh.names import COHORT_HEADER, EXPECTED_TOKENS_HEADER, PRIORITY_HEADER
from helios.proxy.admission.history import History
from helios.proxy.admission.keyring import Caller
from helios.proxy.routing.prefix import Blocks
from helios.proxy.routing.rules import NORMAL_BAND

# Blocks of 256 bytes: prompts that have their first kilobyte in common begin alike.
_COHORT_BLOCKS: Final = 4


def hint_headers(caller: Caller, model: str, blocks: Blocks, history: History) -> dict[str, str]:
    """Returns the headers for a request of a caller for a model, whose prompt has these blocks; empty: nothing."""
    found: dict[str, str] = {}
    if caller.key_id or caller.priority != NORMAL_BAND:
        found[PRIORITY_HEADER] = str(caller.priority)
    if caller.key_id:
        found[EXPECTED_TOKENS_HEADER] = str(history.answer_tokens(model, caller.key_id))
    if len(blocks) >= _COHORT_BLOCKS:
        found[COHORT_HEADER] = f"{blocks[_COHORT_BLOCKS - 1] & 0xFFFFFFFFFFFFFFFF:x}"
    return found
