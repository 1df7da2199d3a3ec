"""Settings of fetching ahead."""

from pydantic import BaseModel, ConfigDict, Field


class PrefetchSettings(BaseModel):
    """Fetching what the registry expects to be wanted, before it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    bytes_per_hour: int = Field(default=50_000_000_000, ge=0)
    """Most that is fetched ahead in an hour, in bytes, whatever the registry wishes; what people ask for (``helios
    cache prefetch``) is not counted. 50 GB: a tenth of what a link of 1 Gbit/s carries. 0: nothing is fetched ahead."""
