"""Which vLLM the rest of ``compat`` knows. Of any other nothing is replaced: it does everything in its own way."""

from typing import Final

import structlog
import vllm

log = structlog.get_logger()

PINNED: Final = (0, 32)


def is_pinned() -> bool:
    """Returns whether the installed vLLM is of the minor version that the contracts hold for."""
    return bool(vllm.__version_tuple__[:2] == PINNED)


def check_version() -> bool:
    """Returns ``is_pinned``, and says so in the log where it is not."""
    if is_pinned():
        return True
    log.warning(
        "unknown vLLM version: it is used as it is, without what makes starts and tokens cheaper",
        version=vllm.__version__,
        pinned=".".join(map(str, PINNED)),
    )
    return False
