"""The log files of replicas, one each: their names, and how many are kept.

`helios up` bounds the size of every log. Their number is bounded here, by whoever makes them: a model that fails at
each start, or one that is started for each request, would fill a disk with small files. Logs of replicas that live are
never taken.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

# The last failures of a model and what worked before them.
KEPT_PER_MODEL: Final = 10
# A node may serve thousands of models, each for a moment.
KEPT: Final = 200
_PREFIX: Final = "replica-"
_SUFFIX: Final = ".log"
_PART_LENGTH: Final = 100


def log_path(directory: Path, model: str, replica_id: str) -> Path:
    """Returns where a replica logs: ``replica-<model>.<id>.log``, both without what has a meaning in paths."""
    return directory / f"{_PREFIX}{path_part(model)}.{path_part(replica_id)}{_SUFFIX}"


def surplus(names: Iterable[str], living: Collection[str]) -> list[str]:
    """Returns which of these log files may go: the names, newest first, and the ids of the replicas that live."""
    spared = {path_part(replica_id) for replica_id in living}
    kept: Counter[str] = Counter()
    gone = []
    for name in names:
        model, dot, replica_id = name.removeprefix(_PREFIX).removesuffix(_SUFFIX).rpartition(".")
        if not dot or replica_id in spared:
            continue
        if kept[model] < KEPT_PER_MODEL and kept.total() < KEPT:
            kept[model] += 1
        else:
            gone.append(name)
    return gone


def drop_surplus(directory: Path, living: Collection[str]) -> int:
    """Removes old log files; returns how many replicas' logs went. Blocking."""
    ages = {}
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        try:
            ages[path.name] = path.stat().st_mtime
        except FileNotFoundError:
            continue
    names = surplus(sorted(ages, key=ages.__getitem__, reverse=True), living)
    for name in names:
        (directory / name).unlink(missing_ok=True)
        # What `helios up` moved there.
        (directory / f"{name}.1").unlink(missing_ok=True)
    return len(names)


def path_part(text: str) -> str:
    """Returns a name as part of a file name: what others make up must not lead out of the directory."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in text)[:_PART_LENGTH]
