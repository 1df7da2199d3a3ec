"""Commands that are carried out once, however often they come.

A proxy repeats a command whose ack it did not see, after a reconnect or from another proxy that took over. The answer
is remembered by command id and given again.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from helios.mesh.errors import HeliosError, InvalidRequest
from helios.worker.replica.settings import EngineSettings, LoraAdapter
from helios.worker.supervisor.records import MemoryItem

# A proxy repeats within seconds; at a thousand commands a second this still remembers four.
DEFAULT_CAPACITY: Final = 4096


@dataclass(frozen=True, slots=True)
class Start:
    """Start a replica. ``engine`` empty and the numbers 0: the worker's defaults. ``options`` are the engine's.

    ``served_names`` are the model's other names. ``requested_at`` (seconds since the epoch) and ``traceparent`` are of
    the request that asked; 0 and empty: none did. ``is_background``: nobody waits for it.
    """

    replica_id: str
    model: str
    revision: str
    engine: str = ""
    memory_bytes: int = 0
    kv_cache_bytes: int = 0
    max_context_tokens: int = 0
    options: Mapping[str, str] = field(default_factory=dict)
    settings: EngineSettings = field(default_factory=EngineSettings)
    served_names: tuple[str, ...] = ()
    memory_items: tuple[MemoryItem, ...] = ()
    host_memory_items: tuple[MemoryItem, ...] = ()
    device_ids: tuple[str, ...] = ()
    device_count: int = 1
    requested_at: float = 0.0
    traceparent: str = ""
    is_background: bool = False


@dataclass(frozen=True, slots=True)
class Drain:
    """Let a replica finish its requests for at most this long, then stop it. None: the worker's drain timeout."""

    replica_id: str
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop a replica now."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Drop a revision's bytes from the node."""

    revision: str


@dataclass(frozen=True, slots=True)
class Stage:
    """Bring a revision's weights to host memory; ``memory_bytes`` 0: their size is not known yet."""

    revision: str
    model: str
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Unstage:
    """Give a staged revision's memory back."""

    revision: str


@dataclass(frozen=True, slots=True)
class Sleep:
    """Take an idle replica's weights and KV cache off its device."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Bring a sleeping replica back."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class SetAdapters:
    """Have these LoRA adapters, each with its revision, and no others."""

    replica_id: str
    adapters: tuple[LoraAdapter, ...]


Command = Start | Drain | Stop | Evict | Stage | Unstage | Sleep | Wake | SetAdapters


@dataclass(frozen=True, slots=True)
class Ack:
    """What became of a command; ``refused_reason`` is empty where it was accepted.

    ``epoch`` is the highest of a leader, where the command was refused for being of a lower one.
    """

    command_id: str
    refused_reason: str = ""
    message: str = ""
    epoch: int = 0

    @property
    def is_accepted(self) -> bool:
        """Whether the command is being carried out."""
        return not self.refused_reason


class CommandLog:
    """Remembers the answers to the last ``capacity`` commands; the one that was asked about longest ago is forgotten
    first.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._capacity = capacity
        self._answers: OrderedDict[str, Ack] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, command_id: str) -> bool:
        return command_id in self._answers

    def run(self, command_id: str, carry_out: Callable[[], None]) -> Ack:
        """Carries a command out, unless it was, and returns the answer.

        Args:
            command_id: Unique to the command. Empty: refused, since a repetition could not be told.
            carry_out: Accepts by returning and refuses by raising a HeliosError; must not block.
        """
        known = self._answers.get(command_id)
        if known is not None:
            self._answers.move_to_end(command_id)
            return known
        try:
            if not command_id:
                raise InvalidRequest("a command needs an id", reason="COMMAND_ID_MISSING")
            carry_out()
        except HeliosError as error:
            answer = Ack(command_id, error.reason, error.message)
        else:
            answer = Ack(command_id)
        if command_id:
            self._answers[command_id] = answer
            while len(self._answers) > self._capacity:
                self._answers.popitem(last=False)
        return answer
