"""The order in which the files of a revision are fetched, so that a start that loads early can begin soon. Pure."""

import re
from collections.abc import Iterable

from helios.storage.manifest import Digest, Manifest

_WEIGHTS = ".safetensors"
_NUMBER = re.compile(r"(\d+)")


def in_reading_order(manifest: Manifest, blobs: Iterable[Digest]) -> list[Digest]:
    """Sorts blobs of a manifest: first what a start reads whole before it loads, the largest first, then the weights in
    the order of their names, numbers by their value. A blob of several names counts as the one that is read first.
    """
    places: dict[Digest, tuple[bool, int, list[str | int]]] = {}
    for entry in manifest.entries:
        is_weights = entry.path.endswith(_WEIGHTS)
        name: list[str | int] = [int(part) if part.isdigit() else part for part in _NUMBER.split(entry.path)]
        place = (is_weights, 0 if is_weights else -entry.digest.size_bytes, name)
        places[entry.digest] = min(place, places.get(entry.digest, place))
    return sorted(blobs, key=places.__getitem__)
