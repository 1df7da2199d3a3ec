"""Sleep and wake of a replica: weights and KV cache off the device, and back, with proof that they are the same.

Orders come from the supervisor's session alone. The proof is a canary: a fixed prompt, answered greedily when the
replica first became ready; after each wake the same tokens must come out before anybody else is answered. Where they
do not, or where the engine can't wake, the replica fails and is replaced: a model that answers nonsense is worse than
none.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

import structlog

from helios.mesh.errors import HeliosError
from helios.worker.replica.condition import Condition, State
from helios.worker.replica.engine import Engine, Meter, Sampling, Text
from helios.worker.replica.gate import CallGate

log = structlog.get_logger()

_PROMPT: Final = Text("Count the days of the week: Monday, Tuesday, Wednesday,")
# Random weights agree on a token by chance once in a vocabulary; eight in a row, and the end is not reached early.
_SAMPLING: Final = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
# The proxy sends nothing any more when it orders sleep; what overtook the order ends, or keeps the replica awake.
_IDLE_SECONDS: Final = 10.0


@runtime_checkable
class SleepingEngine(Protocol):
    """What an engine with ``facts.can_sleep`` can do on top; called with no request running, one call at a time."""

    async def sleep(self, level: int) -> int:
        """Frees the device's memory: 1 keeps weights in host memory, 2 drops them. Returns what is left; 0: unknown."""
        ...

    async def wake(self) -> None:
        """Takes memory again and loads weights. Raises HeliosError where it can't."""
        ...


class Sleeping:
    """Carries orders out, one after the other. ``run`` is its whole life; ``fail`` ends the replica.

    Invariant: the gate lets calls in only while the engine is awake and its canary was right.
    """

    def __init__(
        self,
        engine: Engine,
        gate: CallGate,
        condition: Condition,
        *,
        on_change: Callable[[], None],
        fail: Callable[[str, str], None],
    ) -> None:
        self._engine = engine
        self._gate = gate
        self._condition = condition
        self._on_change = on_change
        self._fail = fail
        # None: wake; a number: sleep at that level.
        self._orders: asyncio.Queue[int | None] = asyncio.Queue()
        self._expected: tuple[int, ...] | None = None

    def order_sleep(self, level: int) -> None:
        """Asks for sleep; an engine that can't stays awake and says so."""
        self._orders.put_nowait(level)

    def order_wake(self) -> None:
        """Asks for waking; nothing happens to one that is awake."""
        self._orders.put_nowait(None)

    async def run(self) -> None:
        """Records the canary, then waits for orders until cancelled."""
        if not isinstance(self._engine, SleepingEngine) or not self._engine.facts.can_sleep:
            await self._refuse_all()
            return
        try:
            self._expected = await self._ask_canary()
        except HeliosError as error:
            log.warning("no canary could be recorded, so this replica never sleeps", error=error.message)
            await self._refuse_all()
            return
        log.info("canary recorded", token_count=len(self._expected))
        while True:
            level = await self._orders.get()
            if level is not None and self._condition.state is State.READY:
                await self._sleep(self._engine, level)
            elif level is None and self._condition.state is State.ASLEEP:
                await self._wake(self._engine)

    async def _refuse_all(self) -> None:
        while True:
            if await self._orders.get() is not None:
                self._say_awake()

    async def _sleep(self, engine: SleepingEngine, level: int) -> None:
        if not await self._gate.pause(_IDLE_SECONDS):
            self._gate.resume()
            log.info("replica stays awake: it has requests")
            self._say_awake()
            return
        started = time.monotonic()
        try:
            self._condition.left_bytes = await engine.sleep(level)
        except HeliosError as error:
            self._fail("SLEEP_FAILED", error.message)
            return
        self._condition.state = State.ASLEEP
        self._on_change()
        seconds = round(time.monotonic() - started, 4)
        log.info("replica asleep", level=level, left_bytes=self._condition.left_bytes, seconds=seconds)

    async def _wake(self, engine: SleepingEngine) -> None:
        self._condition.state = State.WAKING
        self._on_change()
        started = time.monotonic()
        try:
            await engine.wake()
            woken = time.monotonic()
            answered = await self._ask_canary()
        except HeliosError as error:
            self._fail("WAKE_FAILED", error.message)
            return
        if answered != self._expected:
            log.error("canary failed", expected=self._expected, answered=answered)
            self._fail(
                "CANARY_FAILED", "after waking, a known prompt got other tokens than at the start: wrong weights"
            )
            return
        self._condition.wake_count += 1
        self._condition.left_bytes = 0
        self._condition.state = State.READY
        self._gate.resume()
        self._on_change()
        now = time.monotonic()
        log.info("replica awake", wake_seconds=round(woken - started, 4), canary_seconds=round(now - woken, 4))

    def _say_awake(self) -> None:
        self._condition.ready_count += 1
        self._on_change()

    async def _ask_canary(self) -> tuple[int, ...]:
        meter = Meter("canary", time.monotonic())
        pieces = self._engine.generate(_PROMPT, _SAMPLING, meter)
        return tuple([token async for batch in pieces for piece in batch for token in piece.token_ids])
