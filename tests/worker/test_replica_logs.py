"""How many logs of replicas are kept."""

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from helios.worker.replica_logs import KEPT, KEPT_PER_MODEL, drop_surplus, log_path, surplus

names = st.lists(
    st.builds(
        lambda model, number: log_path(Path(), model, f"{number:x}").name, st.sampled_from("abc"), st.integers(0, 999)
    ),
    unique=True,
    max_size=400,
)


@given(names, st.sets(st.integers(0, 999)))
def test_the_newest_of_each_model_and_all_that_live_are_kept(found: list[str], numbers: set[int]) -> None:
    living = {f"{number:x}" for number in numbers}
    gone = surplus(found, living)
    left = [name for name in found if name not in gone]
    ended = [name for name in left if name.split(".")[1] not in living]
    assert not any(name.split(".")[1] in living for name in gone)
    assert len(ended) <= KEPT
    for model in "abc":
        own = [name for name in found if name.startswith(f"replica-{model}.") and name.split(".")[1] not in living]
        assert [name for name in ended if name in own] == own[:KEPT_PER_MODEL]


def test_many_models_share_a_bound() -> None:
    found = [log_path(Path(), f"m{number}", "1").name for number in range(KEPT + 5)]
    assert surplus(found, ()) == found[KEPT:]


def test_files_go_with_what_was_moved_from_them_and_others_stay(tmp_path: Path) -> None:
    paths = [log_path(tmp_path, "org/../m.1", f"{number}") for number in range(KEPT_PER_MODEL + 2)]
    for age, path in enumerate(paths):
        assert path.parent == tmp_path
        path.write_text("x")
        Path(f"{path}.1").write_text("y")
        os.utime(path, (1000 - age, 1000 - age))
    for other in ("worker.log", "replica-of-an-older-version.log"):
        (tmp_path / other).write_text("z")
    assert drop_surplus(tmp_path, {str(KEPT_PER_MODEL)}) == 1
    assert not paths[-1].exists()
    assert not Path(f"{paths[-1]}.1").exists()
    assert paths[-2].exists()
    assert len(list(tmp_path.iterdir())) == 2 * (KEPT_PER_MODEL + 1) + 2


def test_a_directory_that_is_not_there_has_no_logs(tmp_path: Path) -> None:
    assert drop_surplus(tmp_path / "none", ()) == 0
