"""Connections to object stores for what obstore does not ask of them: how long they wait, what is repeated."""

from typing import Final

import urllib3

_CONNECT_SECONDS: Final = 5.0
_RETRY: Final = urllib3.Retry(
    total=5,
    backoff_factor=0.2,
    backoff_max=10,
    status_forcelist=(408, 429, 500, 502, 503, 504),
    # Parts, beginnings and completions may all be sent again: what a store has twice of them is dropped or swept.
    allowed_methods=None,
    raise_on_status=False,
    # Slept through in one piece, up to six hours, which nobody could cancel.
    respect_retry_after_header=False,
)


def open_pool(request_seconds: float) -> urllib3.PoolManager:
    """Returns a pool whose requests are tried six times, each for so long; ``clear`` closes it. Thread-safe."""
    timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=request_seconds)
    return urllib3.PoolManager(maxsize=32, timeout=timeout, retries=_RETRY)
