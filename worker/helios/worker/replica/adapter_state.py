"""Where a replica's LoRA adapters stand: the words that replica and supervisor share. Pure."""

import enum
from dataclasses import dataclass

from helios.worker.replica.settings import LoraAdapter


class AdapterState(enum.Enum):
    """The values are the contract's names without their prefix."""

    LOADING = "LOADING"
    LOADED = "LOADED"
    FAILED = "FAILED"
    UNLOADING = "UNLOADING"


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One adapter of one revision; ``reason`` and ``message`` say why it can't be used, where it is FAILED."""

    adapter: LoraAdapter
    state: AdapterState
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter that a replica is to have, and the directory of its files; empty: not on the node yet."""

    adapter: LoraAdapter
    path: str = ""
