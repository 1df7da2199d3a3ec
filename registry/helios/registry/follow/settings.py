"""Settings of following."""

from pydantic import BaseModel, ConfigDict, Field


class FollowSettings(BaseModel):
    """Bounds of looking at followed sources."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_concurrent: int = Field(default=4, ge=1, le=64)
    """Sources that are looked at at once, their ingests included. 4: a slow place does not hold up the others, and none
    is asked by many."""
    poll_seconds: float = Field(default=5.0, gt=0)
    """How often the database is asked whether a look is due. 5: half of the shortest interval; one row of an index."""
    look_seconds: float = Field(default=120.0, gt=0)
    """A look that takes longer has failed. 120: a tree of thousands of files, a page at a time, with retries."""
    ingest_seconds: float = Field(default=4 * 3600.0, gt=0)
    """An ingest that takes longer is given up; the next one goes on with what was downloaded. 4 hours: 400 GB at 30
    MB/s."""
