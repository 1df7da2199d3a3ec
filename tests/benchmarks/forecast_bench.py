"""How right forecasts of usage are, on traces of real services, and what they cost.

The judges: the second half of each trace. Constants of `usage/forecasting.py` were chosen on the first halves. The
traces are an hour long and name no models: each half hour is stretched to four weeks of hours, and requests are given
to ten models by Zipf's law (seeded). What is stretched has the traces' bursts and no rhythm of days, so each is judged
twice: as it is, and thinned by a rhythm of days (a sine, another phase for each model) and of weeks (three tenths at
weekends), which is made up and said to be.

Errors are over hours from the second week on, one hour ahead, against expecting what came in the last hour, and what
came at the same hour of the day before (MASE against each; below 1 is better than that). Where a trace has little but
bursts, the last hour is hard to beat, and the bar is not to be much worse.

The traces are not part of the repository; without them (`HELIOS_TRACES`, a directory) only the cost is measured.
Sources: Azure/AzurePublicDataset, AzureLLMInferenceTrace_code (CC BY 4.0); kvcache-ai/Mooncake, conversation trace
(Apache-2.0).
"""

import csv
import json
import math
import os
import random
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from helios.registry.usage.forecasting import Forecaster, forecast_of

HOURS = 4 * 7 * 24
MODELS = 10
SEEDS = (1, 2, 3)
JUDGED_FROM = 7 * 24


def run() -> Iterator[dict[str, Any]]:
    """Yields errors by trace and rhythm, then the cost of a model."""
    directory = os.environ.get("HELIOS_TRACES", "")  # noqa: TID251 - where the traces are is this machine's matter
    for name, times in _traces(Path(directory)) if directory else ():
        for rhythm in ("stretched", "seasonal"):
            yield from _judge(f"registry.forecast_{name}_{rhythm}", times, is_seasonal=rhythm == "seasonal")
    yield _cost()


def _traces(directory: Path) -> Iterator[tuple[str, list[float]]]:
    rows = csv.DictReader((directory / "azure-llm-2023-code.csv").open())
    yield "azure", _second_half([datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows])
    lines = (directory / "mooncake-conversation.jsonl").read_text().splitlines()
    yield "mooncake", _second_half([json.loads(line)["timestamp"] / 1000 for line in lines])


def _second_half(times: list[float]) -> list[float]:
    middle = (min(times) + max(times)) / 2
    return [at - middle for at in times if at >= middle]


def _series(times: list[float], seed: int, *, is_seasonal: bool) -> list[list[int]]:
    generator = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(MODELS)]
    phases = [generator.randrange(24) for _ in range(MODELS)]
    hours = [[0] * HOURS for _ in range(MODELS)]
    span = max(times) * 1.0001
    for at in times:
        model = generator.choices(range(MODELS), weights)[0]
        hour = int(at / span * HOURS)
        day = 0.5 + 0.5 * math.sin(math.tau * (hour % 24 - phases[model]) / 24)
        week = 0.3 if hour // 24 % 7 >= 5 else 1.0
        if not is_seasonal or generator.random() < day * week:
            hours[model][hour] += 1
    return hours


def _judge(name: str, times: list[float], *, is_seasonal: bool) -> Iterator[dict[str, Any]]:
    ours = last = day_before = requests = covered = 0.0
    count = 0
    for seed in SEEDS:
        for series in _series(times, seed, is_seasonal=is_seasonal):
            forecaster = Forecaster()
            for hour, came in enumerate(series):
                if hour >= JUDGED_FROM:
                    expected = forecaster.forecast(1).hours[0]
                    ours += abs(expected.requests - came)
                    last += abs(series[hour - 1] - came)
                    day_before += abs(series[hour - 24] - came)
                    requests += came
                    covered += round(expected.low) <= came <= round(expected.high + 0.5)
                    count += 1
                forecaster.learn(came)
    yield _result(f"{name}_mase_last_hour", ours / last, "ratio", last / count, count)
    yield _result(f"{name}_mase_day_before", ours / day_before, "ratio", day_before / count, count)
    yield _result(f"{name}_wmape", ours / requests, "ratio", None, count)
    yield _result(f"{name}_covered", covered / count, "ratio", None, count)


def _cost() -> dict[str, Any]:
    """CPU of five weeks of one model, for 10,000 of which there is an hour."""
    generator = random.Random(1)
    series = [float(generator.randint(0, 40)) for _ in range(35 * 24)]
    began = time.process_time()
    for _ in range(20):
        forecast_of(series, 24)
    seconds = (time.process_time() - began) / 20
    return _result("registry.forecast_cpu_of_10000_models", 10_000 * seconds, "s", None, 20)


def _result(name: str, value: float, unit: str, baseline: float | None, samples: int) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "unit": unit, "baseline": baseline, "samples": samples}
