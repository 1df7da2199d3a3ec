"""What a cordon is."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Cordon:
    """A worker that nothing more is to be started on."""

    worker_id: str
    created_at: datetime
