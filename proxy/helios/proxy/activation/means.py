"""A mean that follows a changed machine within a few measurements. Pure."""

from typing import Final

# Half of the weight lies on the last two or three values.
_NEW_SHARE: Final = 0.3


def moved_mean(mean: float | None, value: float) -> float:
    """An exponentially weighted mean with one more value; None: this is the first."""
    return value if mean is None else mean + _NEW_SHARE * (value - mean)
