"""Settings of pushes."""

from pydantic import BaseModel, ConfigDict, Field


class PushSettings(BaseModel):
    """How models are pushed to OCI registries; who the registry is to them, ``sources.oci`` says."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_concurrent: int = Field(default=2, ge=1, le=64)
    """Pushes that run at once; more are refused (UNAVAILABLE). 2: one sends, one looks."""
    in_flight: int = Field(default=4, ge=1, le=64)
    """Blobs of a push that are sent at once; memory is this times ``chunk_bytes``. 4: shards of a large model fill a
    Gbit/s, and registries bear it."""
    chunk_bytes: int = Field(default=8 << 20, ge=1 << 16, le=1 << 30)
    """What one request sends of a blob, and what a broken connection costs, in bytes. 8 MiB; a registry that wants
    larger chunks gets them, up to 64 MiB, and beyond that the blob in one piece."""
    keep_seconds: float = Field(default=86_400.0, ge=0)
    """How long an unfinished upload is remembered, so that the next push goes on with it. A day: registries forget them
    after a week at most."""
