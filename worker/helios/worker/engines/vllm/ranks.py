"""Which cores each process of an engine computes on. Pure."""

from collections.abc import Sequence


def rank_cores(cores: Sequence[int], rank: int, rank_count: int) -> list[int]:
    """Returns the cores of one rank: equal shares, and a core for several ranks where there are fewer cores.

    vLLM's own binding wants a NUMA node for each rank, and sets environment variables that a fork reads too late.
    """
    if not cores:
        return []
    if len(cores) < rank_count:
        return [cores[rank % len(cores)]]
    share = len(cores) // rank_count
    return list(cores[rank * share : (rank + 1) * share])
