"""On which workers a model's candidates are: what a cordon bears on, without a look at each of a thousand. Pure."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet


class Sites:
    """Candidates by model and worker.

    Invariant: a replica is at one site at most, and what has no replica is not kept.
    """

    def __init__(self) -> None:
        self._models: dict[str, dict[str, dict[str, None]]] = {}
        self._site_of: dict[str, tuple[str, str]] = {}

    def put(self, replica_id: str, model: str, worker_id: str) -> None:
        """A replica is a candidate; harmless when repeated."""
        site = (model, worker_id)
        if self._site_of.get(replica_id) == site:
            return
        self.remove(replica_id)
        self._site_of[replica_id] = site
        self._models.setdefault(model, {}).setdefault(worker_id, {})[replica_id] = None

    def remove(self, replica_id: str) -> None:
        """A replica is none any more; harmless where it was none."""
        site = self._site_of.pop(replica_id, None)
        if site is None:
            return
        model, worker_id = site
        workers = self._models[model]
        del workers[worker_id][replica_id]
        if not workers[worker_id]:
            del workers[worker_id]
        if not workers:
            del self._models[model]

    def of(self, model: str) -> Iterator[str]:
        """A model's candidates."""
        for replica_ids in self._models.get(model, {}).values():
            yield from replica_ids

    def on(self, model: str, worker_ids: AbstractSet[str]) -> tuple[str, ...]:
        """A model's candidates on some workers, in time by those that both have and the fewer of either."""
        workers = self._models.get(model)
        if workers is None or workers.keys().isdisjoint(worker_ids):
            return ()
        return tuple(
            replica_id for worker_id in sorted(workers.keys() & worker_ids) for replica_id in workers[worker_id]
        )
