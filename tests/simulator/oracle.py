"""What somebody who knows every arrival would pay: the bound below.

The oracle has a replica of each model ready at each arrival, and books a device only where that takes one: while
requests run, and between two of them for the shorter of the pause and of a stop with a start from memory. No request is
cold, none waits for another one's batch. No policy without cold starts can cost less; fleets have no bounds here.
"""

from collections.abc import Sequence

import numpy as np

from tests.simulator.loads import HOUR, Floats, Load
from tests.simulator.world import Hardware, Model, Tier


def oracle(
    hardware: Hardware, models: Sequence[Model], needed_bytes: Sequence[int], load: Load
) -> tuple[Floats, float]:
    """Returns seconds to the first token by judged request, and device-seconds of the judged hours."""
    owners = np.array(load.models)
    prompts, completions = np.array(load.prompt_tokens), np.array(load.completion_tokens)
    steps = np.array([model.step_seconds for model in models])[owners]
    first = prompts * np.array([model.prompt_token_seconds for model in models])[owners] + steps
    times = np.array(load.times)
    ends = times + first + np.maximum(0, completions - 1) * steps
    shares = np.array(needed_bytes) / hardware.device_bytes
    restart = np.array(
        [hardware.stop_seconds + hardware.started_after(Tier.MEMORY, model.entry.weights_bytes) for model in models]
    )
    begin, finish = load.span.warm_up_hours * HOUR, load.span.simulated_hours * HOUR
    device_seconds = 0.0
    order = np.lexsort((times, owners))
    bounds = np.searchsorted(owners[order], np.arange(len(models) + 1))
    for model in np.unique(owners):
        rows = order[bounds[model] : bounds[model + 1]]
        starts, latest = times[rows], np.maximum.accumulate(ends[rows])
        # What is booked around each request: its start, unless the one before lasts that long, until its end.
        booked_from = starts - restart[model]
        booked_from[1:] = np.maximum(booked_from[1:], latest[:-1])
        spans = np.minimum(latest, finish) - np.maximum(booked_from, begin)
        device_seconds += float(np.maximum(0.0, spans).sum() * shares[model])
    return (first + hardware.edge_seconds)[times >= begin], device_seconds
