"""Requests over virtual time: popularity, rhythms, bursts, and real traces.

Each load has days behind it, of which only the hours' counts are kept (what the registry would have), and the hours
that are simulated. Conversations have turns: a request is followed by two more on the mean, half a minute apart, so
arrivals are no Poisson process in any load.

- ``seasonal``: each model has a day of its own region's: almost nothing at night, 2.7 times its mean at the peak.
- ``bursty``: no rhythm; conversations come in bursts of eight within some fifteen minutes, and bursts at random.
- replays: the arrivals and lengths of a real trace. Traces are an hour long and name no models, so half of one is
  stretched over all hours, each request is given to one of twenty models by Zipf's law, and each group of twenty models
  begins at another place of the trace, which is a ring. With a rhythm, requests are thinned by the same day as above.
"""

import csv
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

HOUR: Final = 3600.0
_TURNS: Final = 3.0
_PAUSE_SECONDS: Final = 30.0
_BURST_SESSIONS: Final = 8.0
_BURST_SECONDS: Final = 900.0
_REGIONS: Final = 3
_GROUP: Final = 20
# Lengths of synthetic requests, in tokens: medians and the spread of their logarithms, near those of the conversation
# trace's shorter half.
_PROMPT: Final = (700.0, 1.0)
_COMPLETION: Final = (150.0, 0.8)
_MOST_TOKENS: Final = 7_000
_MOONCAKE_TICK_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True)
class Span:
    """Hours of a study: those before, of which only counts are known; those that are simulated; of these the first are
    not judged.
    """

    history_hours: int = 7 * 24
    warm_up_hours: int = 6
    judged_hours: int = 24

    @property
    def simulated_hours(self) -> int:
        """All that is simulated."""
        return self.warm_up_hours + self.judged_hours

    @property
    def hours(self) -> int:
        """All there is."""
        return self.history_hours + self.simulated_hours


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in the order of their arrival, in seconds from the beginning of what is simulated.

    Attributes:
        hours: requests by model and hour, ``[models, hours] float64``: history and what is simulated.
    """

    name: str
    span: Span
    times: list[float]
    models: list[int]
    prompt_tokens: list[int]
    completion_tokens: list[int]
    hours: Floats


def seasonal(model_count: int, requests_per_second: float, span: Span, seed: int) -> Load:
    """Returns a load with a rhythm of days."""
    generator = np.random.default_rng((1, seed))
    rates = (
        _zipf(model_count)[:, None] * requests_per_second * HOUR / _TURNS * _days(model_count, span.hours, generator)
    )
    counts = generator.poisson(rates)
    models, hours = np.divmod(np.repeat(np.arange(counts.size), counts.ravel()), span.hours)
    starts = (hours + generator.random(len(hours))) * HOUR
    return _load("seasonal", starts, models, generator, model_count=model_count, span=span)


def bursty(model_count: int, requests_per_second: float, span: Span, seed: int) -> Load:
    """Returns a load of bursts without a rhythm."""
    generator = np.random.default_rng((2, seed))
    rates = _zipf(model_count) * requests_per_second * HOUR * span.hours / _TURNS / _BURST_SESSIONS
    counts = generator.poisson(rates)
    owners = np.repeat(np.arange(model_count), counts)
    begins = generator.random(len(owners)) * span.hours * HOUR
    sizes = generator.geometric(1.0 / _BURST_SESSIONS, len(owners))
    lengths = generator.exponential(_BURST_SECONDS, len(owners))
    models = np.repeat(owners, sizes)
    starts = np.repeat(begins, sizes) + generator.random(len(models)) * np.repeat(lengths, sizes)
    return _load("bursty", starts, models, generator, model_count=model_count, span=span)


def replay(trace: "Trace", model_count: int, span: Span, seed: int, *, has_rhythm: bool) -> Load:
    """Returns a load from a trace; models are a multiple of twenty."""
    generator = np.random.default_rng((3, seed))
    group_count = model_count // _GROUP
    size = len(trace.times)
    seconds = span.hours * HOUR
    shifts = np.repeat(generator.random(group_count), size)
    starts = (np.tile(trace.times, group_count) + shifts) % 1.0 * seconds
    groups = np.repeat(np.arange(group_count), size)
    models = groups * _GROUP + generator.choice(_GROUP, len(starts), p=_zipf(_GROUP))
    rows = np.tile(np.arange(size), group_count)
    name = f"{trace.name} as it is"
    if has_rhythm:
        days = _days(model_count, span.hours, generator)
        likely = days[models, (starts // HOUR).astype(np.int64)] / days.max()
        kept = generator.random(len(starts)) < likely
        starts, models, rows, name = starts[kept], models[kept], rows[kept], f"{trace.name} with a day"
    tokens = trace.prompt_tokens[rows], trace.completion_tokens[rows]
    return _packed(name, starts, models, tokens, model_count=model_count, span=span)


@dataclass(frozen=True, slots=True)
class Trace:
    """Half of a real trace: arrivals as shares of its length, 0 to 1, and lengths in tokens."""

    name: str
    times: Floats
    prompt_tokens: Ints
    completion_tokens: Ints


def traces(directory: Path, *, half: int) -> list[Trace]:
    """Reads the traces; of each the first half (0) or the second (1)."""
    rows = list(csv.DictReader((directory / "azure-llm-2023-code.csv").read_text().splitlines()))
    azure = [
        (datetime.fromisoformat(r["TIMESTAMP"][:26]).timestamp(), int(r["ContextTokens"]), int(r["GeneratedTokens"]))
        for r in rows
    ]
    lines = (directory / "mooncake-conversation.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    # Its clock ticks every three seconds, which stretched would be pauses of ten minutes: what one tick has is spread.
    spread = np.random.default_rng(0).random(len(told)) * _MOONCAKE_TICK_SECONDS
    mooncake = [
        (t["timestamp"] / 1000 + later, t["input_length"], t["output_length"])
        for t, later in zip(told, spread, strict=True)
    ]
    return [_half("azure-code", azure, half), _half("mooncake-conversation", mooncake, half)]


def _half(name: str, rows: list[tuple[float, int, int]], half: int) -> Trace:
    table = np.array(sorted(rows), dtype=np.float64)
    times = (table[:, 0] - table[0, 0]) / (table[-1, 0] - table[0, 0] + 1e-9)
    kept = (times >= 0.5) == bool(half)
    tokens = np.clip(table[kept, 1:], 1, _MOST_TOKENS).astype(np.int64)
    return Trace(name, (times[kept] - 0.5 * half) * 2.0 % 1.0, tokens[:, 0], tokens[:, 1])


def _zipf(count: int) -> Floats:
    weights = 1.0 / np.arange(1, count + 1)
    shares: Floats = weights / weights.sum()
    return shares


def _days(model_count: int, hours: int, generator: np.random.Generator) -> Floats:
    """Returns each model's rhythm by hour, ``[models, hours]``, 1 on the mean."""
    regions = generator.integers(_REGIONS, size=model_count) * (24.0 / _REGIONS)
    phases = regions + generator.normal(0.0, 1.5, model_count)
    angle = 2.0 * np.pi * (np.arange(hours)[None, :] - phases[:, None]) / 24.0
    squares = np.square(0.5 + 0.5 * np.sin(angle))
    # The mean of such squares over a day.
    days: Floats = squares / 0.375
    return days


def _load(
    name: str, starts: Floats, models: Ints, generator: np.random.Generator, *, model_count: int, span: Span
) -> Load:
    """Makes turns of conversations."""
    turns = generator.geometric(1.0 / _TURNS, len(starts))
    models = np.repeat(models, turns)
    pauses = _PAUSE_SECONDS * np.exp(generator.normal(0.0, 1.0, len(models)))
    ends = np.cumsum(turns)
    firsts = ends - turns
    pauses[firsts] = 0.0
    offsets = np.cumsum(pauses)
    times = np.repeat(starts, turns) + offsets - np.repeat(offsets[firsts], turns)
    tokens = (
        np.clip(middle * np.exp(generator.normal(0.0, spread, len(times))), 1, _MOST_TOKENS).astype(np.int64)
        for middle, spread in (_PROMPT, _COMPLETION)
    )
    prompt_tokens, completion_tokens = tokens
    return _packed(name, times, models, (prompt_tokens, completion_tokens), model_count=model_count, span=span)


def _packed(name: str, times: Floats, models: Ints, tokens: tuple[Ints, Ints], *, model_count: int, span: Span) -> Load:
    """Makes a load of requests in any order, with prompts' and completions' tokens."""
    inside = times < span.hours * HOUR
    times, models = times[inside], models[inside]
    prompts, completions = (some[inside] for some in tokens)
    places = models * span.hours + (times // HOUR).astype(np.int64)
    hours = np.bincount(places, minlength=model_count * span.hours).astype(np.float64)
    begin = span.history_hours * HOUR
    late = np.flatnonzero(times >= begin)
    order = late[np.argsort(times[late], kind="stable")]
    return Load(
        name=name,
        span=span,
        times=(times[order] - begin).tolist(),
        models=models[order].tolist(),
        prompt_tokens=prompts[order].tolist(),
        completion_tokens=completions[order].tolist(),
        hours=hours.reshape(model_count, span.hours),
    )
