"""The models that exist, as the registry told.

The registry is the truth; this is the proxy's copy, fed by the registry's watch and kept on disk, so that a proxy that
starts while the registry is down still knows its models. A name that is not here is *unknown* only while the copy is in
step with the registry (`is_synced`); otherwise it may be a model made meanwhile, and nobody may say 404.

Pure. Errors are the caller's: `find` returns None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from helios.mesh.routing import USUAL_ROUTING, ModelRouting
from helios.proxy.engine_needs import needs_of
from helios.proxy.scaling.policy import Scaling

# The registry refuses longer names.
_NAME_LENGTH = 200
# As much of a digest as tells revisions apart.
_DIGITS = 12
_HEXADECIMAL = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model and its served revision. `created_at` is in seconds since the epoch; sizes are of one replica.

    `engine_settings` is the contract's JSON; empty says nothing. `canary` names the entry of the revision that
    `canary_percent` of the requests go to instead; empty: all go to this one.
    """

    name: str
    revision: str
    aliases: tuple[str, ...] = ()
    weights_bytes: int = 0
    kv_bytes_per_token: int = 0
    max_context_tokens: int = 0
    parameter_count: int = 0
    dtype: str = ""
    architecture: str = ""
    source: str = ""
    created_at: int = 0
    min_replicas: int = 0
    max_replicas: int = 0
    engine_settings: str = ""
    layer_count: int = 0
    vocabulary_size: int = 0
    tensor_parallel_options: tuple[int, ...] = ()
    """Into how many ranks its layers can be split; empty: nobody knows."""
    pipeline_parallel_options: tuple[int, ...] = ()
    """Into how many stages its layers can be cut; the same."""
    base_model: str = ""
    canary: str = ""
    canary_percent: int = 0
    scaling: Scaling | None = None
    """What the policy says beside the bounds that hold now; None: nothing."""
    is_durable: bool = False
    """Streamed answers go on on another replica where their own dies, unless a request says otherwise."""
    routing: ModelRouting = USUAL_ROUTING
    """What the policy says of how one of its replicas is chosen."""

    @property
    def is_adapter(self) -> bool:
        """It has no replicas: models that name it in their engine settings answer with it."""
        return bool(self.base_model)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of adapters that requests for this model may use."""
        return needs_of(self.engine_settings).adapter_names

    @property
    def role(self) -> str:
        """Which part of a request its replicas do: "prefill" or "decode"; else all of it."""
        return needs_of(self.engine_settings).role if self.engine_settings else ""


def shown(name: str) -> str:
    """A name that a client sent, fit for a message: no control characters, and no longer than a model's name may be."""
    clipped = name if len(name) <= _NAME_LENGTH else name[:_NAME_LENGTH] + "…"
    return clipped if clipped.isprintable() else "".join(char if char.isprintable() else "�" for char in clipped)


def is_by_digest(name: str) -> bool:
    """Whether a name is a revision's, by a model's name and the beginning of a digest: only the registry can say."""
    _, mark, which = name.partition("@")
    digits = which.removeprefix("sha256:")
    return bool(mark) and 6 <= len(digits) <= 64 and _HEXADECIMAL.issuperset(digits)


def addressed_name(model: str, digest: str) -> str:
    """The name of the entry of a revision that its model does not serve."""
    return f"{model}@{digest.removeprefix('sha256:')[:_DIGITS]}"


class Catalogue:
    """Models by name and alias.

    Invariants: `find(name)` finds every model under its name, each of its aliases and each of its adapters' names; a
    model's own name wins over another model's alias, and an adapter's name over the adapter's own entry.
    """

    def __init__(self) -> None:
        self._models: dict[str, ModelEntry] = {}
        self._aliases: dict[str, str] = {}
        self._pinned: set[str] = set()
        self._prefill: set[str] = set()
        self._scheduled: set[str] = set()
        self._revisions: Counter[str] = Counter()
        self.is_synced = False

    def find(self, name: str) -> ModelEntry | None:
        """A model by its name or an alias."""
        entry = self._models.get(name)
        if entry is None or entry.is_adapter:
            owner = self._aliases.get(name)
            entry = self._models.get(owner, entry) if owner is not None else entry
        return entry

    def get(self, name: str) -> ModelEntry | None:
        """A model or an adapter by its own name in the registry."""
        return self._models.get(name)

    def named(self, name: str) -> ModelEntry | None:
        """What engine settings mean by a name: the model or adapter of that name, else the model with that alias."""
        return self.get(name) or self.find(name)

    def models(self) -> list[ModelEntry]:
        """All models, by name."""
        return [self._models[name] for name in sorted(self._models)]

    def pinned(self) -> AbstractSet[str]:
        """Names of models with min_replicas above 0."""
        return self._pinned

    def scheduled(self) -> AbstractSet[str]:
        """Names of models whose bounds change with time."""
        return self._scheduled

    def prefill_models(self, revision: str) -> list[ModelEntry]:
        """Models of this revision whose replicas compute prompts for those that decode."""
        entries = [self._models[name] for name in sorted(self._prefill)]
        return [entry for entry in entries if entry.revision == revision]

    def serves(self, revision: str) -> bool:
        """Whether any model serves a revision."""
        return self._revisions[revision] > 0

    def replace(self, entries: Iterable[ModelEntry]) -> set[str]:
        """Takes in all models at once; returns the names that are new, changed or gone."""
        old = self._models
        self._models, self._aliases, self._pinned, self._prefill = {}, {}, set(), set()
        self._scheduled, self._revisions = set(), Counter()
        for entry in entries:
            self._add(entry)
        names = old.keys() | self._models.keys()
        return {name for name in names if old.get(name) != self._models.get(name)}

    def upsert(self, entry: ModelEntry) -> bool:
        """Takes in one model; True where that changed something."""
        old = self._models.get(entry.name)
        if old == entry:
            return False
        if old is not None:
            self._drop(old)
        self._add(entry)
        return True

    def delete(self, name: str) -> bool:
        """Forgets a model; True where it was known."""
        entry = self._models.get(name)
        if entry is None:
            return False
        self._drop(entry)
        return True

    def __len__(self) -> int:
        """How many models there are."""
        return len(self._models)

    def _add(self, entry: ModelEntry) -> None:
        if (old := self._models.get(entry.name)) is not None:
            self._revisions[old.revision] -= 1
        self._models[entry.name] = entry
        self._revisions[entry.revision] += 1
        # An alias that moved is told with its new owner first or its old owner first; the later word counts.
        for alias in (*entry.aliases, *entry.adapters):
            self._aliases[alias] = entry.name
        if entry.min_replicas:
            self._pinned.add(entry.name)
        if entry.scaling is not None and entry.scaling.windows:
            self._scheduled.add(entry.name)
        if entry.role == "prefill":
            self._prefill.add(entry.name)

    def _drop(self, entry: ModelEntry) -> None:
        del self._models[entry.name]
        self._revisions[entry.revision] -= 1
        if not self._revisions[entry.revision]:
            # What was served once is not remembered for ever.
            del self._revisions[entry.revision]
        for alias in (*entry.aliases, *entry.adapters):
            if self._aliases.get(alias) == entry.name:
                del self._aliases[alias]
        self._pinned.discard(entry.name)
        self._prefill.discard(entry.name)
        self._scheduled.discard(entry.name)
