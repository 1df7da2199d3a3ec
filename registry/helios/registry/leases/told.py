"""A lease as its holder and others are told of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToldLease:
    """A lease at the moment of the answer. ``holder`` empty: nobody holds it."""

    name: str
    holder: str
    address: str
    """Where others reach the holder, in its own words."""
    epoch: int
    """Of the last grant; 0: there was none."""
    rest_seconds: float
    """When it ends unless it is renewed, from the moment of the answer; 0 where nobody holds it."""
