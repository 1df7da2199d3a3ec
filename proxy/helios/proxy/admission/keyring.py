"""Whose request it is, by its API key, and which models they may use. Pure.

A secret is 256 random bits and is recognised by its sha256: nobody can guess what a slow hash (argon2) would protect,
and a slow hash would be spent on each request, on wrong ones by anybody who sends them. The hash is looked up in a
dict, whose time depends on the bits of hashes and not of secrets: it tells nothing that helps to find a secret.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Final

from helios.mesh.errors import Unauthenticated, Unavailable
from helios.mesh.names import KEY_PREFIX
from helios.proxy.catalogue import ModelEntry
from helios.proxy.refusals import model_not_found
from helios.proxy.routing.rules import NORMAL_BAND

_SCHEME: Final = "bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may use; limits of 0 are none. `expires_at` is in seconds since the epoch, 0: never."""

    key_id: str = ""
    tenant: str = ""
    models: tuple[str, ...] = ()
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    priority: int = NORMAL_BAND
    weight: int = 1
    expires_at: float = 0.0
    _pattern: re.Pattern[str] | None = field(init=False, default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.models:
            globs = (".*".join(map(re.escape, glob.split("*"))) for glob in self.models)
            object.__setattr__(self, "_pattern", re.compile("|".join(globs)))

    @classmethod
    def of_fields(cls, values: dict[str, Any]) -> Caller:
        """The caller of `as_fields`. Raises TypeError, KeyError."""
        return cls(**{**values, "models": tuple(values["models"])})

    def as_fields(self) -> dict[str, Any]:
        """What it is made of, for a file."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    def may_use(self, entry: ModelEntry, name: str) -> bool:
        """Whether requests may name `name`, which means `entry`.

        A model is allowed by the name that is used or by its own, with or without what follows "@"; an adapter by its
        own name alone, since the base model's says nothing of it.
        """
        if self._pattern is None:
            return True
        names = (name,) if name in entry.adapters else (name, entry.name)
        return any(
            self._pattern.fullmatch(one) is not None or self._pattern.fullmatch(one.partition("@")[0]) is not None
            for one in names
        )


ANYBODY: Final = Caller()


class Keyring:
    """The keys that count now.

    Invariant: a secret is recognised if, and only if, it is one of the last `replace`'s keys and has not expired.
    """

    def __init__(self, *, is_required: bool, has_free_bands: bool = False) -> None:
        """``is_required``: requests without a key are refused; ``has_free_bands``: they may ask for any priority."""
        self.is_required = is_required
        self.has_free_bands = has_free_bands
        self._callers: dict[bytes, Caller] = {}
        self._by_id: dict[str, Caller] = {}
        self._is_known = False

    def replace(self, keys: Iterable[tuple[bytes, Caller]]) -> None:
        """Takes in all keys that count, by the sha256 of their secrets."""
        self._callers = dict(keys)
        self._by_id = {caller.key_id: caller for caller in self._callers.values()}
        self._is_known = True

    def keys(self) -> list[tuple[bytes, Caller]]:
        """All keys, as `replace` took them."""
        return list(self._callers.items())

    def find(self, key_id: str) -> Caller | None:
        """Whose key has this id; None where it is not known here."""
        return self._by_id.get(key_id)

    def identify(self, authorization: str, now: float) -> Caller:
        """Says whose request it is; `now` is in seconds since the epoch.

        Where keys are not required, a secret that is not Helios's own counts as none: client libraries insist on
        sending something.

        Raises:
            Unauthenticated: there is no key and one is required (MISSING_API_KEY), or it is none (INVALID_API_KEY).
            Unavailable: the keys have never been told; nobody is refused for good for that.
        """
        if not authorization and not self.is_required:
            return ANYBODY
        is_bearer = authorization[: len(_SCHEME)].lower() == _SCHEME
        secret = authorization[len(_SCHEME) :].strip() if is_bearer else ""
        if not secret.startswith(KEY_PREFIX) and not self.is_required:
            return ANYBODY
        if not secret:
            raise Unauthenticated(
                "an API key is required: send it as the header Authorization: Bearer KEY", reason="MISSING_API_KEY"
            )
        if not self._is_known:
            raise Unavailable(
                "API keys can't be checked yet: the registry is not reachable",
                reason="REGISTRY_UNAVAILABLE",
                retry_after_seconds=1,
            )
        caller = self._callers.get(hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest())
        if caller is None or (caller.expires_at and caller.expires_at <= now):
            raise Unauthenticated("the API key is not valid: it is wrong, revoked or expired", reason="INVALID_API_KEY")
        return caller


def check_model(caller: Caller, entry: ModelEntry, name: str) -> None:
    """Refuses a model that a caller may not use, in the words for one that is not there: names are nobody's business.

    Raises:
        ModelNotFound: it is not on the key's list.
    """
    if not caller.may_use(entry, name):
        raise model_not_found(name)
