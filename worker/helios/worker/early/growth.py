"""What is here of a revision that a replica loads early, and whether what it read counts. Pure.

    watching ── enough is here ──▶ begun ── lent ──▶ whole
        │                            │
        └── lent ──▶ (not early)     └── a file is fetched anew, or nobody knows ──▶ lost ── lent ──▶ whole

What was read of a growing file counts as long as the fetch that brought it goes on. A load that sees in time that the
fetch began anew waits for the lease and loads again; one that had ended by then was of bytes that nobody vouches for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from helios.mesh.transfer.spans import Spans
from helios.worker.replica.settings import EngineSettings

# transformers' and users' loaders read files as they come to them; vLLM's has one place for all tensors.
_ENGINES: Final = frozenset({"vllm"})
_WEIGHTS: Final = ".safetensors"
# Mistral's own format: vLLM chooses it by looking for these files, and reads others of the configuration then.
_CONSOLIDATED: Final = "consolidated"
CONFIG: Final = "config.json"
LENGTH_BYTES: Final = 8
"""A safetensors file begins with the length of its header, little-endian."""


class ToldFile(Protocol):
    """A file, as the storage agent tells of it."""

    @property
    def path(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def spans(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def generation(self) -> int: ...


class Told(Protocol):
    """What the storage agent tells of a revision."""

    @property
    def files(self) -> Iterable[ToldFile]: ...
    @property
    def awaited_paths(self) -> tuple[str, ...]: ...


@dataclass(slots=True)
class _File:
    size_bytes: int
    generation: int
    spans: Spans = field(default_factory=Spans)

    @property
    def is_whole(self) -> bool:
        return self.spans.covers(0, self.size_bytes)


class EarlyGrowth:
    """The state of one early load.

    Invariants: ``version`` grows with each change; what is lost stays lost; a load that is noted while nothing is lost
    counts unless something is lost later.
    """

    def __init__(self) -> None:
        self.version = 0
        self.has_begun = False
        self.is_lost = False
        self.is_lent = False
        self._has_loaded = False
        self._is_spoiled = False
        self._files: dict[str, _File] = {}
        self._awaited: tuple[str, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether no load that ended has read what does not count any more."""
        return not self._is_spoiled

    @property
    def weights(self) -> list[str]:
        """Paths of the files that tensors are in, those included of which nothing is here."""
        return sorted(path for path in (*self._files, *self._awaited) if _is_weights(path))

    def take(self, told: Told) -> None:
        """Takes all that is known now."""
        for file in told.files:
            known = self._files.get(file.path)
            if known is None:
                known = self._files[file.path] = _File(file.size_bytes, file.generation)
            spans = Spans(file.spans)
            is_same_fetch = file.generation in (0, known.generation) and file.size_bytes == known.size_bytes
            if not is_same_fetch or not all(spans.covers(*before) for before in known.spans):
                self._lose()
            known.generation, known.spans = file.generation, spans
        self._awaited = told.awaited_paths
        self.version += 1

    def break_off(self) -> None:
        """Nobody tells any more what becomes of the files; what was told does not count where nothing has begun."""
        if self.has_begun:
            self._lose()
        else:
            self._files, self._awaited = {}, ()
        self.version += 1

    def lend(self, *, is_same: bool) -> None:
        """The revision is lent; ``is_same``: from the files that were read."""
        if not is_same:
            self._lose()
        self.is_lent = True
        self.version += 1

    def note_loaded(self) -> bool:
        """A load has ended; returns whether it counts so far."""
        self._has_loaded = self._has_loaded or not self.is_lost
        return not self.is_lost

    def covers(self, path: str, start: int, end: int) -> bool:
        """Whether a range of a file is here and verified."""
        file = self._files.get(path)
        return file is not None and file.spans.covers(start, end)

    @property
    def may_begin(self) -> bool:
        """Whether all is here but weights, and these are such as an early load can read, and not all here too."""
        weights = self.weights
        others = [path for path in (*self._files, *self._awaited) if not _is_weights(path)]
        is_ours = CONFIG in others and weights and not any(path.startswith(_CONSOLIDATED) for path in weights)
        return bool(
            is_ours
            and all(self._is_whole(path) for path in others)
            and not all(self._is_whole(path) for path in weights)
        )

    def to_document(self) -> dict[str, Any]:
        """What a load is told: JSON values."""
        return {
            "version": self.version,
            "is_lost": self.is_lost,
            "is_lent": self.is_lent,
            "weights": self.weights,
            "spans": {path: list(file.spans) for path, file in self._files.items() if _is_weights(path)},
        }

    def _is_whole(self, path: str) -> bool:
        file = self._files.get(path)
        return file is not None and file.is_whole

    def _lose(self) -> None:
        self.is_lost = True
        self._is_spoiled = self._is_spoiled or self._has_loaded


def suits(engine: str, settings: EngineSettings) -> bool:
    """Whether a start with this engine and these settings can load early. A draft model comes by a lease of its own."""
    return engine.partition(":")[0] in _ENGINES and not settings.draft_revision


def needs_every_header(config: Mapping[str, Any]) -> bool:
    """Whether vLLM looks into the headers of all files while it reads this configuration.

    It does for the type of the tensors where that is not said, and, where the output layer is said to be the input
    embedding, for one that is there all the same.
    """
    text = config.get("text_config")
    kinds = [part.get("dtype") or part.get("torch_dtype") for part in (config, text) if isinstance(part, dict)]
    return not any(kinds) or config.get("tie_word_embeddings") is not False


def _is_weights(path: str) -> bool:
    return path.endswith(_WEIGHTS) and "/" not in path
