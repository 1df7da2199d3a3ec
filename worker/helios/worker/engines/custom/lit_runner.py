"""The thread in which a LitAPI lives: set-up, then requests, one after the other, in batches, or as coroutines.

One thread, as LitServe has one process a device: a model need not be safe for threads.
"""

import asyncio
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any, Final

from helios.mesh.errors import HeliosError, Overloaded, ReplicaLost
from helios.worker.engines.custom.lit_hooks import Hooks
from helios.worker.engines.custom.user_code import user_code
from helios.worker.engines.handover import Handover

# Far above what a picker sends to one replica.
_QUEUE_SIZE: Final = 4096
# Parts of an answer that its reader may be behind; a generator need not have an end.
_UNREAD_LIMIT: Final = 16_384


class Exchange(Handover[Any]):
    """A request for users' code, and its outputs on their way back."""

    def __init__(self, request: Any) -> None:
        super().__init__()
        self.request = request

    def give(self, output: Any) -> None:
        """Hands an output over. Raises Overloaded where the reader is too far behind."""
        if self.unread_count > _UNREAD_LIMIT:
            raise Overloaded("the answer is not read as fast as it is made", reason="SLOW_READER")
        self.put(output)


class LitRunner:
    """Runs a LitAPI. Call ``start`` once, ``submit`` in the event loop, ``close`` in the end.

    A cancelled exchange that waits is skipped; of one that runs, the generators are closed at their next output, and
    coroutines are cancelled at once. ``predict`` of an API that does not stream can't be interrupted.
    """

    def __init__(self, api: Any, device: str) -> None:
        self._api = api
        self._device = device
        self._hooks = Hooks(api)
        self._queue: queue.Queue[Exchange | None] = queue.Queue(_QUEUE_SIZE)
        self._exchanges: set[Exchange] = set()
        self._ready: Future[None] = Future()
        self._is_closed = False
        self._thread = threading.Thread(target=self._live, name="custom engine", daemon=True)

    @property
    def waiting_count(self) -> int:
        """Requests that the thread has not taken."""
        return self._queue.qsize()

    @property
    def is_dead(self) -> bool:
        """Whether the thread ended by itself: the class asked for it (``sys.exit``)."""
        return not self._is_closed and not self._thread.is_alive()

    def start(self) -> None:
        """Runs ``setup`` and returns when it is over. Raises what it failed with."""
        self._thread.start()
        self._ready.result()

    def submit(self, exchange: Exchange) -> None:
        """Queues a request. Raises Overloaded where too many wait, ReplicaLost after ``close``."""
        if self._is_closed:
            raise _closed()
        try:
            self._queue.put_nowait(exchange)
        except queue.Full as error:
            raise Overloaded(f"{_QUEUE_SIZE} requests wait for this replica", retry_after_seconds=1.0) from error
        self._exchanges.add(exchange)

    def forget(self, exchange: Exchange) -> None:
        """Gives a request up, or notes that it is over."""
        exchange.is_cancelled.set()
        self._exchanges.discard(exchange)

    def close(self) -> None:
        """Ends the thread when what runs in it lets it; what waits fails. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for exchange in self._exchanges:
            exchange.is_cancelled.set()
            exchange.fail(_closed())
        self._queue.put(None)

    def _live(self) -> None:
        try:
            with user_code("setup"):
                self._api.setup(self._device)
            self._api.device = self._device
        except HeliosError as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        if self._api.enable_async:
            asyncio.run(self._serve_async())
        elif self._api.max_batch_size > 1:
            while batch := self._take_batch():
                self._serve_batch(batch)
        else:
            while (exchange := self._queue.get()) is not None:
                if not exchange.is_cancelled.is_set():
                    self._serve_one(exchange)

    def _serve_one(self, exchange: Exchange) -> None:
        outputs: Any = self._hooks.run_one(exchange.request)
        try:
            with user_code("a hook"):
                for output in outputs:
                    if exchange.is_cancelled.is_set():
                        break
                    exchange.give(output)
            exchange.end()
        except HeliosError as error:
            exchange.fail(error)
        finally:
            outputs.close()

    def _take_batch(self) -> list[Exchange]:
        """Waits for a request and then, as long as the API says, for more; empty at the end."""
        batch: list[Exchange] = []
        deadline = 0.0
        while len(batch) < self._api.max_batch_size:
            try:
                wait_seconds = max(0.0, deadline - time.monotonic())
                exchange = (
                    self._queue.get(timeout=wait_seconds) if batch and wait_seconds else self._queue.get(not batch)
                )
            except queue.Empty:
                break
            if exchange is None:
                # Seen again by the next call, after this batch.
                self._queue.put(None)
                return [one for one in batch if not one.is_cancelled.is_set()]
            if not exchange.is_cancelled.is_set():
                deadline = deadline or time.monotonic() + self._api.batch_timeout
                batch.append(exchange)
        return batch

    def _serve_batch(self, batch: list[Exchange]) -> None:
        rows: Any = self._hooks.run_batch([exchange.request for exchange in batch])
        over: set[Exchange] = set()
        try:
            with user_code("a hook"):
                for row in rows:
                    self._give_row(batch, row, over)
                    if all(exchange in over or exchange.is_cancelled.is_set() for exchange in batch):
                        break
            for exchange in batch:
                if exchange not in over:
                    exchange.end()
        except HeliosError as error:
            for exchange in batch:
                if exchange not in over:
                    exchange.fail(error)
        finally:
            rows.close()

    def _give_row(self, batch: list[Exchange], row: Any, over: set[Exchange]) -> None:
        """Hands each request its output; one that failed, or is not read, is over."""
        for exchange, output in zip(batch, row, strict=True):
            if exchange in over or exchange.is_cancelled.is_set():
                continue
            try:
                if isinstance(output, HeliosError):
                    raise output
                exchange.give(output)
            except HeliosError as error:
                exchange.fail(error)
                over.add(exchange)

    async def _serve_async(self) -> None:
        async with asyncio.TaskGroup() as group:
            tasks: set[asyncio.Task[None]] = set()
            while (exchange := await asyncio.to_thread(self._queue.get)) is not None:
                task = group.create_task(self._serve_coroutine(exchange), name="custom request")
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            for task in tuple(tasks):
                task.cancel()

    async def _serve_coroutine(self, exchange: Exchange) -> None:
        outputs: Any = self._hooks.run_async(exchange.request)
        try:
            with user_code("a hook"):
                async for output in outputs:
                    if exchange.is_cancelled.is_set():
                        break
                    exchange.give(output)
            exchange.end()
        except HeliosError as error:
            exchange.fail(error)
        finally:
            await outputs.aclose()


def _closed() -> ReplicaLost:
    return ReplicaLost("the engine was closed", retry_after_seconds=1.0)
