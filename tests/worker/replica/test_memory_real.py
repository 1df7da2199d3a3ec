"""A live replica's measured private memory is what was booked for it, within a tenth."""

from pathlib import Path

import pytest

from tests.worker.replica.memory import CASES, measure_ratio
from tests.worker.replica.support import Launcher, Leaves

pytestmark = pytest.mark.real_model


# The benchmark measures the others: the largest takes a minute to fill.
@pytest.mark.parametrize("name", ["64 MiB", "256 MiB", "four large adapters"])
def test_what_is_booked_is_what_it_holds(
    launcher: Launcher, leaves: Leaves, smollm2_directory: Path, tmp_path: Path, name: str
) -> None:
    assert 0.9 <= measure_ratio(launcher, leaves, smollm2_directory, tmp_path, CASES[name]) <= 1.1
