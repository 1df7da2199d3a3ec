"""A live replica's measured private memory is what was booked for it, within a tenth."""

from pathlib import Path

import pytest

from tests.worker.replica.memory import SIZES, measure_ratio
from tests.worker.replica.support import Launcher, Leaves

pytestmark = pytest.mark.real_model


# The largest takes a minute to fill; the benchmark measures it.
@pytest.mark.parametrize("size", SIZES[:2], ids=["64 MiB", "256 MiB"])
def test_what_is_booked_is_what_it_holds(
    launcher: Launcher, leaves: Leaves, smollm2_directory: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    assert 0.9 <= measure_ratio(launcher, leaves, smollm2_directory, tmp_path, size) <= 1.1
