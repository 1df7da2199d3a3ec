"""What somebody who knows every arrival would pay: the bound below.

The oracle has a replica of each model ready at each arrival, and books a device only where that takes one: while
requests run, and between two of them for what costs least: to wait, to stop and start from memory, or to sleep and
wake. No request is cold, none waits for another one's batch. No policy without cold starts can cost less; fleets have
no bounds here.
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
    weights = np.array([model.entry.weights_bytes for model in models])
    loads = weights / hardware.bytes_per_second[Tier.MEMORY]
    restarts = hardware.stop_seconds + hardware.start_seconds + loads
    naps = hardware.sleep_seconds + hardware.wake_seconds + loads
    asleep_share = hardware.asleep_bytes / hardware.device_bytes if hardware.can_sleep else np.inf
    begin, finish = load.span.warm_up_hours * HOUR, load.span.simulated_hours * HOUR
    device_seconds = 0.0
    order = np.lexsort((times, owners))
    bounds = np.searchsorted(owners[order], np.arange(len(models) + 1))
    for model in np.unique(owners):
        rows = order[bounds[model] : bounds[model + 1]]
        starts, latest = times[rows], np.maximum.accumulate(ends[rows])
        # Where the pause before a request began, as far as it is judged; before the first one nothing is known.
        paused_from = np.concatenate(([-np.inf], latest[:-1]))
        spans = np.minimum(latest, finish) - np.maximum(np.maximum(starts, paused_from), begin)
        device_seconds += float(np.maximum(0.0, spans).sum() * shares[model])
        pauses = np.maximum(0.0, np.minimum(starts, finish) - np.maximum(paused_from, begin))
        stops = np.minimum(pauses, restarts[model]) * shares[model]
        sleeps = np.minimum(pauses, naps[model]) * shares[model] + np.maximum(0.0, pauses - naps[model]) * asleep_share
        device_seconds += float(np.minimum(stops, sleeps).sum())
    return (first + hardware.edge_seconds)[times >= begin], device_seconds
