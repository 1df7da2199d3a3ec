"""Settings of usage, forecasts and warm targets."""

from pydantic import BaseModel, ConfigDict, Field

from helios.registry.usage.targets import TargetPolicy


class UsageSettings(BaseModel):
    """What is kept of models' usage, and what is made of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    keep_days: int = Field(default=35, ge=1, le=366)
    """Hours older than this are deleted, in days. 35: five weeks, which the rhythm of weeks is learnt from. A row is
    some 100 bytes, and hours of nothing have none: 1,000 models in use every hour take 85 MB."""
    forecast_delay_seconds: float = Field(default=120.0, ge=0, le=3_000)
    """How long after the beginning of an hour forecasts are made. 120: the proxies' last reports of the hour before are
    here (proxy.usage.report_interval_seconds), and an hour's first requests have said nothing yet."""
    forecast_seconds: float = Field(default=900.0, gt=0, le=3_000)
    """A run that takes longer is ended; forecasts of the hour before go on to hold. 900: 10,000 models in use every
    hour take some three minutes of one core."""
    ready_requests: float = Field(default=4.0, gt=0)
    """Requests expected in an hour from which a model is to have replicas ready, where some come for sure. 4: one in
    each fifteen minutes, which is how long a replica stays idle by the proxy's own setting."""
    sure_requests: float = Field(default=2.0, ge=0)
    """The least that must come in nine of ten such hours, for that. 2: four or five requests that come each for itself,
    or twelve in conversations of three: what is saved is one start for each conversation."""
    asleep_requests: float = Field(default=0.0, ge=0)
    """Requests expected in an hour from which a model's replicas are to sleep on their GPUs rather than stop, where it
    is not to have ready ones. 0: proxies' own times alone say how long replicas sleep, which suits most."""
    memory_ratio: float = Field(default=0.3, gt=0, le=1)
    """Chance of a request within an hour from which weights are to be in host memory."""
    disk_ratio: float = Field(default=0.05, gt=0, le=1)
    """Chance of a request within a day from which a model is to be on nodes' disks."""
    concurrency: float = Field(default=8.0, gt=0)
    """Requests that a replica works on at once, for the number of replicas."""

    idle_seconds: float = Field(default=240.0, ge=0)
    """How long a replica without requests is worth keeping where its model is not to be ready, in seconds; proxies that
    follow targets stop it, or put it to sleep, then, or earlier where their own setting says so. 240: the pauses within
    a conversation. 0: nothing is said."""

    prefetch_bytes_per_hour: int = Field(default=20_000_000_000, ge=0)
    """Most that each node is asked to fetch ahead in an hour, in bytes; its agent has a bound of its own, and takes
    only room that is to spare. 20 GB: a model of 10 B parameters, in three minutes at 1 Gbit/s. 0: nothing, but for
    what people ask for."""

    @property
    def target_policy(self) -> TargetPolicy:
        """The share of the settings that targets are made by."""
        return TargetPolicy(
            ready_requests=self.ready_requests,
            sure_requests=self.sure_requests,
            asleep_requests=self.asleep_requests,
            memory_ratio=self.memory_ratio,
            disk_ratio=self.disk_ratio,
            concurrency=self.concurrency,
            idle_seconds=self.idle_seconds,
        )
