"""How long a model takes to start, wherever its weights are: what is lost with a replica, for comparison. Pure.

Measured where it was, guessed from its size where it was not. What clients are told is `rungs`'.
"""

from helios.proxy.activation.means import moved_mean


class StartEstimates:
    """Expected seconds from the decision to start a replica until it is ready, by model."""

    def __init__(self, *, base_seconds: float, bytes_per_second: float) -> None:
        """Sets the guess for models that were never started: `base_seconds + weights / bytes_per_second`."""
        self._base_seconds = base_seconds
        self._bytes_per_second = bytes_per_second
        self._means: dict[str, float] = {}

    def record(self, model: str, seconds: float) -> None:
        """Takes in a measured start."""
        self._means[model] = moved_mean(self._means.get(model), seconds)

    def measured(self) -> dict[str, float]:
        """How long models take, as far as was measured."""
        return self._means

    def believe(self, model: str, seconds: float) -> None:
        """Takes in another proxy's mean."""
        self._means[model] = seconds

    def expected_seconds(self, model: str, weights_bytes: int) -> float:
        """How long a start takes from its beginning."""
        mean = self._means.get(model)
        return mean if mean is not None else self._base_seconds + weights_bytes / self._bytes_per_second
