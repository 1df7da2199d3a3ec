"""How many of a model's requests may be tried a second time. Pure.

A retry helps where one replica fails and others don't. Where all of a model's fail, retries only multiply the load on
what is left, so they are rationed: each request earns its model a share of a retry, each retry that is seen costs one.
A model that has used its ration up gets requests with one candidate and no retry, until it has earned more; other
models don't notice.

Envoy does the retrying, before the first byte alone, and tells nobody; what is seen is that a request arrived at
another replica than the one it was sent to, or was refused by one. So a burst of failures within one report may cost
more than there is, and is owed.

Source: the retry budget of Finagle, https://finagle.github.io/blog/2016/02/08/retry-budgets/
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """What is allowed.

    Attributes:
        ratio: retries for each request, in the long run; 0: none but the first few.
        burst_count: retries that may be saved up, which a model that was quiet begins with.
    """

    ratio: float = 0.2
    burst_count: int = 10


class RetryBudgets:
    """A balance for each model with retries or failures; one without has all of it.

    Invariant: of n requests of a model, at most n * ratio + burst_count + (what failed unseen) are retried.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._spent: dict[str, float] = {}

    def request(self, model: str) -> bool:
        """Counts a request; returns whether it may be retried."""
        is_allowed, spent = self.allows(model), self._spent.get(model, 0.0) - self._policy.ratio
        if spent > 0:
            self._spent[model] = spent
        else:
            self._spent.pop(model, None)
        return is_allowed

    def allows(self, model: str) -> bool:
        """Whether the model's next request may be retried."""
        spent = self._spent.get(model)
        if spent is None:
            return self._policy.burst_count > 0
        return spent - self._policy.ratio <= self._policy.burst_count - 1

    def retried(self, model: str) -> None:
        """Counts a retry. What is owed is bounded: a bad minute does not take retries away for an hour."""
        self._spent[model] = min(self._spent.get(model, 0.0) + 1, 2 * self._policy.burst_count)
