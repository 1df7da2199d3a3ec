"""How well memory is predicted: what a live replica holds, over what the ledger booked for it.

Five replicas of the real model, one after the other, with KV caches and contexts of different size, and with adapters;
each works on long prompts, all of its adapters included, before it is measured. The value is the largest distance
from 1.
"""

import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import embedded_model
from tests.worker.replica.memory import CASES, Case, measure_ratio
from tests.worker.replica.support import Launcher, Leaves


def run() -> list[dict[str, Any]]:
    """Measures; `baseline` is the ratio that is furthest from 1."""
    with tempfile.TemporaryDirectory(prefix="hm") as name:
        leaves = Leaves.issue(Path(name, "pki"))
        launcher = Launcher("vllm")
        try:
            ratios = [
                _ratio(launcher, leaves, Path(name, str(number)), case) for number, case in enumerate(CASES.values())
            ]
        finally:
            launcher.close()
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    return [
        {
            "name": "worker.memory_prediction_ratio",
            "value": round(abs(worst - 1), 3),
            "unit": "ratio",
            "baseline": round(worst, 3),
            "samples": len(ratios),
        }
    ]


def _ratio(launcher: Launcher, leaves: Leaves, directory: Path, case: Case) -> float:
    directory.mkdir()
    return measure_ratio(launcher, leaves, embedded_model(), directory, case)


if __name__ == "__main__":
    print(run())
