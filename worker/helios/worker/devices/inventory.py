"""The inventory that the worker asks, and which one a node gets."""

import importlib
from pathlib import Path
from typing import Final, Protocol

import structlog

from helios.worker.devices.host import HostInventory
from helios.worker.devices.nvml import NvmlInventory
from helios.worker.supervisor.records import Device, DeviceMeasure

log = structlog.get_logger()

# The driver makes it; without it there is nothing that NVML could find.
_DRIVER: Final = Path("/proc/driver/nvidia/version")


class Inventory(Protocol):
    """Devices of one kind. A method may block for some milliseconds and never raises: what can't be asked is lost."""

    def devices(self) -> tuple[Device, ...]:
        """Returns the devices, in an order that does not change while the driver runs."""
        ...

    def measure(self) -> tuple[DeviceMeasure, ...]:
        """Measures each device of ``devices``."""
        ...

    def process_bytes(self, pids: frozenset[int]) -> int | None:
        """Returns what processes hold of the devices, together; None where that can't be told."""
        ...

    def close(self) -> None:
        """Lets the driver go. Idempotent."""
        ...


def open_inventory(*, memory_bytes: int | None, gpu_memory_ratio: float) -> Inventory:
    """Returns the inventory of this node: its GPUs where there are any, else the host.

    Args:
        memory_bytes: What replicas may use of the host, where that is the device; None: a share.
        gpu_memory_ratio: What replicas may use of a GPU, 0..1.
    """
    gpus = _open_nvml(gpu_memory_ratio) if _DRIVER.exists() else None
    return gpus if gpus is not None else HostInventory(memory_bytes)


def _open_nvml(memory_ratio: float) -> Inventory | None:
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        log.warning("there is an NVIDIA driver, but nvidia-ml-py is not installed: its devices are not used")
        return None
    inventory = NvmlInventory.open(library, memory_ratio=memory_ratio)
    return inventory if inventory is not None and inventory.devices() else None
