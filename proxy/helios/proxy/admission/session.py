"""The feed of the keyring: the registry's watch of keys, and their copy on disk.

With the registry away the keys stay as they are, so that warm traffic goes on; a key that is revoked meanwhile ends
when the watch is back. The copy holds hashes, of which no secret can be found.
"""

from collections.abc import Sequence
from typing import Protocol

import structlog

from helios.proxy.admission.keyring import Caller, Keyring
from helios.registry.client import KeyClient, StoredKey

log = structlog.get_logger()


class KeyMemory(Protocol):
    """Keeps keys over restarts."""

    async def save_keys(self, keys: Sequence[tuple[bytes, Caller]]) -> None:
        """Replaces what is kept. Raises OSError."""
        ...


async def watch_keys(client: KeyClient, keyring: Keyring, memory: KeyMemory) -> None:
    """Feeds the keyring until the watch breaks. Raises HeliosError then; call it again."""
    async for stored in client.watch():
        keyring.replace((one.sha256, caller_of(one)) for one in stored)
        log.info("keys in step with the registry", keys=len(stored))
        await memory.save_keys(keyring.keys())


def caller_of(stored: StoredKey) -> Caller:
    """Who sends a key."""
    key = stored.key
    return Caller(
        key_id=key.id,
        tenant=key.tenant,
        models=key.models,
        requests_per_minute=key.requests_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        priority=int(key.priority),
        weight=key.weight,
        expires_at=key.expires_at.timestamp() if key.expires_at is not None else 0.0,
    )
