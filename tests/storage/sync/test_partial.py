"""What is told and served of unfinished blobs is what is in the very file that is read, whatever else is fetched."""

from pathlib import Path

import hypothesis.strategies as st
from hypothesis import given

from helios.storage.disk_tier import DiskTier
from helios.storage.early.growth import watch_growth
from helios.storage.manifest import Digest, Manifest, ManifestEntry
from helios.storage.sync.partial import PartialBlobs

HASH = "a" * 64
ONE, TWO = Path("/one/partial", HASH), Path("/two/partial", HASH)


def test_two_fetches_of_one_blob_are_two() -> None:
    partials = PartialBlobs()
    partials.begin(HASH, ONE)
    partials.begin(HASH, TWO)
    partials.add(HASH, ONE, 0, 4)
    assert partials.find(HASH, 0, 4) == ONE
    partials.add(HASH, TWO, 4, 8)
    assert partials.find(HASH, 4, 8) == TWO
    assert partials.find(HASH, 2, 6) is None, "no file has all of it"
    growing = partials.growing(HASH, Path("/two"))
    assert growing is not None
    assert (growing[0], growing[2]) == (TWO, [(4, 8)])
    partials.end(HASH, ONE)
    partials.end(HASH, ONE)
    assert partials.spans(HASH) == [(4, 8)]
    assert partials.growing(HASH, Path("/one")) is None
    partials.end(HASH, TWO)
    assert partials.state(HASH) is None


STEPS = st.lists(st.tuples(st.sampled_from(["begin", "add", "end"]), st.sampled_from([ONE, TWO]), st.integers(0, 5)))


@given(steps=STEPS)
def test_a_file_is_given_for_what_came_there_and_a_version_means_one_state(
    steps: list[tuple[str, Path, int]],
) -> None:
    partials = PartialBlobs()
    here: dict[Path, set[int]] = {}
    states: dict[int, list[tuple[int, int]]] = {}
    for action, path, at in steps:
        match action:
            case "begin":
                partials.begin(HASH, path)
                here[path] = set()
            case "add":
                partials.add(HASH, path, at, at + 1)
                here.get(path, set()).add(at)
            case _:
                partials.end(HASH, path)
                here.pop(path, None)
        for byte in range(6):
            found = partials.find(HASH, byte, byte + 1)
            assert byte in here[found] if found is not None else not any(byte in bytes_ for bytes_ in here.values())
        state = partials.state(HASH)
        assert (state is None) == (not here)
        if state is not None:
            version, spans = state
            assert {byte for start, end in spans for byte in range(start, end)} == set().union(*here.values())
            assert states.setdefault(version, spans) == spans


async def test_a_loader_is_told_of_the_file_that_is_to_be_lent(tmp_path: Path) -> None:
    manifest = Manifest("sha256:" + "b" * 64, (ManifestEntry("w", Digest(HASH, 8), "application/octet-stream"),))
    partials = PartialBlobs()
    fast, slow = tmp_path / "fast" / "partial" / HASH, tmp_path / "slow" / "partial" / HASH
    partials.begin(HASH, slow)
    partials.begin(HASH, fast)
    partials.add(HASH, fast, 0, 8)
    partials.add(HASH, slow, 0, 4)
    async with DiskTier(tmp_path / "slow", fetch_thread_count=1, is_link_allowed=False) as tier:
        changes = watch_growth(lambda: (manifest, tier), partials)
        (file,) = (await anext(changes)).files
        assert (file.path, file.place, file.size_bytes, file.spans) == ("w", str(slow), 8, ((0, 4),))
        await changes.aclose()


def test_a_fetch_that_begins_anew_is_told_apart_from_the_one_before() -> None:
    partials = PartialBlobs()
    generations = []
    for _ in range(3):
        partials.begin(HASH, TWO)
        partials.add(HASH, TWO, 0, 4)
        growing = partials.growing(HASH, TWO.parent)
        assert growing is not None
        generations.append(growing[1])
        partials.add(HASH, TWO, 4, 8)
        assert partials.growing(HASH, TWO.parent) == (TWO, generations[-1], [(0, 8)])
    assert 0 not in generations
    assert len(set(generations)) == 3
