"""What each key may use in a minute: requests, and tokens of prompts and answers. Pure.

A request reserves what it may take when it comes, and settles what it took when its replica says so. The ledger's
events end reservations: a request that finished settles by its usage; one that never started gives everything back; one
whose end nobody will tell (its replica is gone) settles for what it reserved. Where such an end is told all the same
(the body was slow, a worker came back), what the request took and did not pay for yet is charged.

| a reservation | event | next |
|---|---|---|
| — | admit | HELD, or QuotaExceeded, InvalidRequest |
| HELD | finished, with usage or for good | settled by its usage |
| HELD | finished without usage, UNAVAILABLE (Envoy tries elsewhere) | DOUBTFUL |
| HELD | released: refused, left, never started | gone, nothing used |
| HELD | its place at a replica lapsed before it started there | LAPSED, nothing used |
| HELD | lost with its replica, or older than any request may be | LAPSED, settled as reserved |
| DOUBTFUL | started elsewhere | HELD |
| DOUBTFUL | finished elsewhere | settled by its usage |
| DOUBTFUL | its time is over | LAPSED, nothing used |
| LAPSED | finished | gone, what it took beyond what was settled is owed |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from helios.mesh.errors import InvalidRequest, QuotaExceeded, Unavailable
from helios.proxy.admission.bucket import Bucket
from helios.proxy.admission.history import History
from helios.proxy.admission.keyring import Caller
from helios.proxy.admission.slice import Slice

# Envoy cuts a request that sees no byte for an hour; one that streams for longer is settled as reserved meanwhile.
_LIFE_SECONDS: Final = 3600.0
# Envoy's retries are over within a second, and the next report comes within one.
_DOUBT_SECONDS: Final = 15.0
_UNAVAILABLE: Final = 14
_IDLE_SECONDS: Final = 600.0
# Requests whose end may still be told; more than a proxy picks while a body may be on its way.
_LAPSED_COUNT: Final = 16_384


class Usage(NamedTuple):
    """What a request took, as its replica says."""

    request_id: str
    status_code: int
    prompt_tokens: int
    completion_tokens: int


class Standing(NamedTuple):
    """Where a key stands, for the x-ratelimit headers; limits of 0 are none. Resets in seconds."""

    request_limit: int
    request_remaining: int
    request_reset: float
    token_limit: int
    token_remaining: int
    token_reset: float


Limit = Bucket | Slice
Limits = tuple[Limit | None, Limit | None]
"""Of requests, and of tokens; None where a key has no such limit."""


def own_limits(caller: Caller, used_up_at: float | None = None) -> Limits:
    """The limits of a key where this proxy counts for itself and for all others."""
    requests, tokens = caller.requests_per_minute, caller.tokens_per_minute
    return Bucket(requests, used_up_at) if requests else None, Bucket(tokens, used_up_at) if tokens else None


class _Held(NamedTuple):
    bucket: Limit | None
    caller: Caller
    model: str
    body_bytes: int
    tokens: int
    expires_at: float


class _Lapsed(NamedTuple):
    caller: Caller
    model: str
    body_bytes: int
    paid_tokens: int


class _Account:
    """The two buckets of a key, either of which may be missing."""

    def __init__(self, caller: Caller, limits: Limits) -> None:
        self.limits = (caller.requests_per_minute, caller.tokens_per_minute)
        self.requests, self.tokens = limits
        self.used_at = 0.0

    def standing(self, now: float) -> Standing:
        """Where it stands."""
        requests = (0, 0, 0.0) if self.requests is None else _three(self.requests, now)
        tokens = (0, 0, 0.0) if self.tokens is None else _three(self.tokens, now)
        return Standing(*requests, *tokens)


class Quotas:
    """Accounts by key, and what requests have reserved. Requests without a key are nobody's and have none.

    Invariants: what a bucket has reserved is the sum of what its key's requests hold; a request is held or lapsed.
    """

    def __init__(self, history: History | None = None) -> None:
        self.history = history or History()
        self._accounts: dict[str, _Account] = {}
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._doubtful: OrderedDict[str, float] = OrderedDict()
        self._lapsed: OrderedDict[str, _Lapsed] = OrderedDict()
        self._limits_of: Callable[[Caller], Limits] = own_limits
        self._may_spend: Callable[[float], bool] | None = None

    def share(self, limits_of: Callable[[Caller], Limits], may_spend: Callable[[float], bool] | None) -> None:
        """Has limits of keys counted anew, in another way; requests that run settle where they reserved.

        `may_spend` says whether any of them may be used at a time; None: always.
        """
        self._limits_of, self._may_spend = limits_of, may_spend
        self._accounts.clear()

    def limits(self, caller: Caller, now: float) -> Limits:
        """The limits of a key, for those who reserve of them for others."""
        account = self._account(caller, now)
        return account.requests, account.tokens

    def admit(
        self, caller: Caller, request_id: str, model: str, *, body_bytes: int, max_tokens: int, now: float
    ) -> Standing | None:
        """Reserves what a request may take; returns where its key stands then, None where it has no limits.

        Args:
            caller: whose request it is; one without a key is let through.
            request_id: under which its end will be told. One that comes again (Envoy moved it) replaces itself.
            model: the model's own name.
            body_bytes: length of its body, which its prompt is guessed from.
            max_tokens: the longest answer that it asks for, of all its choices; 0: it does not say.
            now: monotonic seconds.

        Raises:
            QuotaExceeded: RATE_LIMIT_REQUESTS or RATE_LIMIT_TOKENS, with the time after which it would fit.
            InvalidRequest: EXCEEDS_TOKEN_LIMIT, it never fits.
        """
        if not caller.key_id:
            return None
        self.release(request_id, now)
        self._lapsed.pop(request_id, None)
        account = self._account(caller, now)
        if self._may_spend is not None and any(account.limits) and not self._may_spend(now):
            raise _not_told(caller)
        history = self.history
        answer_tokens = max_tokens or history.long_answer_tokens(model, caller.key_id)
        tokens = history.prompt_tokens(model, body_bytes) + answer_tokens
        if account.tokens is not None:
            tokens = _fitting(tokens, max_tokens, account.tokens)
        if account.requests is not None and (wait := account.requests.reserve(1, now)):
            raise _exceeded("REQUESTS", account, caller, wait)
        if account.tokens is not None and (wait := account.tokens.reserve(tokens, now)):
            if account.requests is not None:
                account.requests.settle(1, 0, now)
            raise _exceeded("TOKENS", account, caller, wait)
        if account.requests is not None:
            account.requests.settle(1, 1, now)
        self._held[request_id] = _Held(account.tokens, caller, model, body_bytes, tokens, now + _LIFE_SECONDS)
        return account.standing(now) if any(account.limits) else None

    def standing(self, caller: Caller, now: float) -> Standing | None:
        """Where a key stands; None where it has no limits."""
        account = self._accounts.get(caller.key_id)
        return account.standing(now) if account is not None and any(account.limits) else None

    def cost(self, request_id: str, model: str, body_bytes: int) -> int:
        """Tokens that a request is likely to take, for its tenant's share: what it reserved, else a guess."""
        held = self._held.get(request_id)
        if held is not None:
            return held.tokens
        return self.history.prompt_tokens(model, body_bytes) + self.history.long_answer_tokens(model, "")

    def started(self, request_id: str) -> None:
        """A request reached a replica, perhaps another one than it was sent to first."""
        self._doubtful.pop(request_id, None)

    def finished(self, usage: Usage, now: float) -> None:
        """A request left a replica."""
        is_elsewhere = usage.status_code == _UNAVAILABLE and not usage.prompt_tokens and not usage.completion_tokens
        if is_elsewhere:
            if usage.request_id in self._held:
                self._doubtful.pop(usage.request_id, None)
                self._doubtful[usage.request_id] = now + _DOUBT_SECONDS
            return
        tokens = usage.prompt_tokens + usage.completion_tokens
        request = self._take(usage.request_id) or self._lapsed.pop(usage.request_id, None)
        if request is None:
            return
        if isinstance(request, _Held):
            _settle(request, tokens, now)
        else:
            self._owe(request, tokens, now)
        if usage.status_code == 0:
            key_id, body_bytes = request.caller.key_id, request.body_bytes
            self.history.learn(request.model, key_id, body_bytes, usage.prompt_tokens, usage.completion_tokens)

    def release(self, request_id: str, now: float) -> None:
        """A request that reaches no replica gives its tokens back; harmless where it holds none."""
        held = self._take(request_id)
        if held is not None:
            _settle(held, 0, now)

    def lapse(self, request_id: str, now: float) -> None:
        """A request was not heard of for long: it gives its tokens back, and pays when it is heard of after all."""
        self._end(request_id, now, is_paid=False)

    def lost(self, request_ids: Iterable[str], now: float) -> None:
        """Nobody is likely to tell how these ended."""
        for request_id in request_ids:
            self._end(request_id, now, is_paid=True)

    def tick(self, now: float) -> None:
        """Follows the time; to be called about every second."""
        while self._doubtful and next(iter(self._doubtful.values())) <= now:
            self.lapse(next(iter(self._doubtful)), now)
        while self._held and next(iter(self._held.values())).expires_at <= now:
            self.lost([next(iter(self._held))], now)
        for key_id in [key for key, account in self._accounts.items() if _is_idle(account, now)]:
            del self._accounts[key_id]

    def _account(self, caller: Caller, now: float) -> _Account:
        account = self._accounts.get(caller.key_id)
        if account is None or account.limits != (caller.requests_per_minute, caller.tokens_per_minute):
            account = self._accounts[caller.key_id] = _Account(caller, self._limits_of(caller))
        account.used_at = now
        return account

    def _end(self, request_id: str, now: float, *, is_paid: bool) -> None:
        held = self._take(request_id)
        if held is None:
            return
        paid_tokens = held.tokens if is_paid else 0
        _settle(held, paid_tokens, now)
        self._lapsed[request_id] = _Lapsed(held.caller, held.model, held.body_bytes, paid_tokens)
        if len(self._lapsed) > _LAPSED_COUNT:
            self._lapsed.popitem(last=False)

    def _owe(self, lapsed: _Lapsed, tokens: int, now: float) -> None:
        # Its key may have other limits by now, or have been forgotten as idle.
        account = self._accounts.get(lapsed.caller.key_id) or self._account(lapsed.caller, now)
        if account.tokens is not None:
            account.tokens.settle(0, max(0, tokens - lapsed.paid_tokens), now)

    def _take(self, request_id: str) -> _Held | None:
        self._doubtful.pop(request_id, None)
        return self._held.pop(request_id, None)


def _settle(held: _Held, actual: int, now: float) -> None:
    if held.bucket is not None:
        held.bucket.settle(held.tokens, actual, now)


def _fitting(tokens: int, max_tokens: int, bucket: Limit) -> int:
    """What to reserve of a bucket: a guess that is larger than all of it is no reason to refuse, a request is."""
    if tokens <= bucket.capacity:
        return tokens
    if max_tokens:
        raise InvalidRequest(
            f"the prompt and max_tokens ({max_tokens}) take some {tokens} tokens, and the API key allows "
            f"{bucket.capacity} a minute; ask for fewer",
            reason="EXCEEDS_TOKEN_LIMIT",
            metadata={"param": "max_tokens", "limit": str(bucket.capacity), "tokens": str(tokens)},
        )
    return bucket.capacity


def _is_idle(account: _Account, now: float) -> bool:
    """Whether an account is as good as a new one."""
    if now - account.used_at < _IDLE_SECONDS:
        return False
    return all(bucket is None or not bucket.reset_seconds(now) for bucket in (account.requests, account.tokens))


def _not_told(caller: Caller) -> Unavailable:
    """What a key used elsewhere is not known, and might be all of its limit."""
    return Unavailable(
        "the API key's limits can't be checked now: the gateway's proxies have lost sight of one another",
        reason="LIMITS_UNKNOWN",
        metadata={"key": caller.key_id},
        retry_after_seconds=1,
    )


def _three(bucket: Limit, now: float) -> tuple[int, int, float]:
    return bucket.capacity, bucket.remaining(now), bucket.reset_seconds(now)


def _exceeded(what: str, account: _Account, caller: Caller, wait_seconds: float) -> QuotaExceeded:
    limit = account.limits[0] if what == "REQUESTS" else account.limits[1]
    return QuotaExceeded(
        f"the API key's limit of {limit} {what.lower()} a minute is reached; try again in {wait_seconds:.1f} s",
        reason=f"RATE_LIMIT_{what}",
        metadata={"key": caller.key_id, "limit": str(limit)},
        retry_after_seconds=wait_seconds,
    )
