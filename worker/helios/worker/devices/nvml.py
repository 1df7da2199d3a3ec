"""GPUs and MIG slices, as NVML tells of them.

A card may vanish between two calls ("fallen off the bus"), so each card is asked on its own and an error of one is that
card's health, not an exception. What a card or slice can't say (a slice has no utilisation, a consumer card no ECC)
stays unknown. A card that is cut into slices is no device itself: its slices are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import structlog

from helios.worker.supervisor.records import (
    Device,
    DeviceFacts,
    DeviceKind,
    DeviceLink,
    DeviceMeasure,
    Health,
    LinkKind,
)

log = structlog.get_logger()

T = TypeVar("T")

# nvmlDeviceGetRemappedRows: (corrected, uncorrected, is_pending, failure_occurred). Source: nvml.h.
_PENDING, _FAILED = 2, 3
_LOST_MESSAGE: Final = "the driver can't reach it any more; the node needs a reboot"


@dataclass(frozen=True, slots=True)
class _Card:
    """One card; ``handle`` None: it was lost before it was asked for anything. ``slices`` by device id."""

    device_id: str
    handle: Any
    slices: Mapping[str, Any]


class NvmlInventory:
    """The cards of a node.

    Args:
        nvml: The module ``pynvml``, initialised.
        memory_ratio: What replicas may use of a device's memory: the rest is what the driver and other processes take.
        sysfs: Where the kernel tells the NUMA node of a PCI device.
    """

    def __init__(self, nvml: Any, *, memory_ratio: float, sysfs: Path = Path("/sys/bus/pci/devices")) -> None:
        self._nvml = nvml
        self._memory_ratio = memory_ratio
        self._sysfs = sysfs
        self._cards = [self._find(index) for index in range(nvml.nvmlDeviceGetCount())]
        self._devices = tuple(device for card in self._cards for device in self._describe(card))

    @classmethod
    def open(cls, nvml: Any, *, memory_ratio: float, sysfs: Path = Path("/sys/bus/pci/devices")) -> Self | None:
        """Returns the inventory; None where NVML finds no driver."""
        try:
            nvml.nvmlInit()
            return cls(nvml, memory_ratio=memory_ratio, sysfs=sysfs)
        except nvml.NVMLError as error:
            log.warning("NVML can't be used", error=str(error))
            return None

    def devices(self) -> tuple[Device, ...]:
        """Returns the cards, and the slices of those that are cut; a card that is lost from the start has no memory."""
        return self._devices

    def measure(self) -> tuple[DeviceMeasure, ...]:
        """Measures every device."""
        return tuple(measure for card in self._cards for measure in self._measure(card))

    def process_bytes(self, pids: frozenset[int]) -> int | None:
        """Returns the device memory of processes; None where the driver does not see them (another pid namespace)."""
        held = []
        for card in self._cards:
            for handle in card.slices.values() or (() if card.handle is None else (card.handle,)):
                running = self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
                held += [entry.usedGpuMemory for entry in running if entry.pid in pids and entry.usedGpuMemory]
        return sum(held) if held else None

    def close(self) -> None:
        """Lets the driver go."""
        self._ask(self._nvml.nvmlShutdown)

    # What does not change.

    def _find(self, index: int) -> _Card:
        device_id = f"cuda:{index}"
        handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            return _Card(device_id, None, {})
        mode = self._ask(self._nvml.nvmlDeviceGetMigMode, handle)
        if not mode or mode[0] != self._nvml.NVML_DEVICE_MIG_ENABLE:
            return _Card(device_id, handle, {})
        slices = {}
        for number in range(self._ask(self._nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            part = self._ask(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
            if part is not None:
                slices[f"{device_id}/mig:{number}"] = part
        return _Card(device_id, handle, slices)

    def _describe(self, card: _Card) -> list[Device]:
        if card.handle is None:
            return [Device(card.device_id, DeviceKind.CUDA, 0)]
        nvml = self._nvml
        pci = self._ask(nvml.nvmlDeviceGetPciInfo, card.handle)
        bus_id = _text(pci.busId) if pci is not None else ""
        capability = self._ask(nvml.nvmlDeviceGetCudaComputeCapability, card.handle)
        facts = DeviceFacts(
            name=_text(self._ask(nvml.nvmlDeviceGetName, card.handle) or ""),
            uuid=_text(self._ask(nvml.nvmlDeviceGetUUID, card.handle) or ""),
            numa_node=self._numa_node(card.handle, bus_id),
            pci_bus_id=bus_id,
            compute_capability=".".join(map(str, capability)) if capability else "",
            links=() if card.slices else self._links(card),
        )
        if card.slices:
            return [self._slice(card, name, part, facts) for name, part in card.slices.items()]
        return [Device(card.device_id, DeviceKind.CUDA, self._usable_bytes(card.handle), facts)]

    def _slice(self, card: _Card, device_id: str, handle: Any, whole: DeviceFacts) -> Device:
        # Such as "NVIDIA A100-SXM4-80GB MIG 3g.40gb".
        name, _, profile = _text(self._ask(self._nvml.nvmlDeviceGetName, handle) or "").partition(" MIG ")
        uuid = _text(self._ask(self._nvml.nvmlDeviceGetUUID, handle) or "")
        facts = replace(whole, name=name, uuid=uuid, parent_device_id=card.device_id, mig_profile=profile)
        return Device(device_id, DeviceKind.CUDA, self._usable_bytes(handle), facts)

    def _usable_bytes(self, handle: Any) -> int:
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle)
        return int(memory.total * self._memory_ratio) if memory is not None else 0

    def _numa_node(self, handle: Any, bus_id: str) -> int | None:
        node = self._ask(self._nvml.nvmlDeviceGetNumaNodeId, handle)
        if node is not None:
            return int(node)
        # NVML writes eight digits of the domain, the kernel four, in small letters.
        try:
            told = int((self._sysfs / bus_id[-12:].lower() / "numa_node").read_text())
        except (OSError, ValueError):
            return None
        # -1: the firmware does not say.
        return told if told >= 0 else None

    def _links(self, card: _Card) -> tuple[DeviceLink, ...]:
        others = [other for other in self._cards if other is not card and other.handle is not None and not other.slices]
        own = self._active_links(card.handle) if others else []
        return tuple(link for other in others if (link := self._link(card, other, own)) is not None)

    def _link(self, card: _Card, other: _Card, own: list[str]) -> DeviceLink | None:
        nvml = self._nvml
        index = nvml.NVML_P2P_CAPS_INDEX_NVLINK
        if self._ask(nvml.nvmlDeviceGetP2PStatus, card.handle, other.handle, index) == nvml.NVML_P2P_STATUS_OK:
            pci = self._ask(nvml.nvmlDeviceGetPciInfo, other.handle)
            direct = own.count(_text(pci.busId)) if pci is not None else 0
            # Behind NVSwitch every link leads to a switch, and all of them to every card.
            return DeviceLink(other.device_id, LinkKind.NVLINK, direct or len(own))
        ancestor = self._ask(nvml.nvmlDeviceGetTopologyCommonAncestor, card.handle, other.handle)
        if ancestor is None:
            return None
        if ancestor <= nvml.NVML_TOPOLOGY_MULTIPLE:
            return DeviceLink(other.device_id, LinkKind.PCIE_SWITCH)
        if ancestor <= nvml.NVML_TOPOLOGY_NODE:
            return DeviceLink(other.device_id, LinkKind.PCIE_HOST)
        return DeviceLink(other.device_id, LinkKind.SYSTEM)

    def _active_links(self, handle: Any) -> list[str]:
        """Returns where each NVLink that is up leads: PCI addresses of cards or switches."""
        nvml, ends = self._nvml, []
        for number in range(nvml.NVML_NVLINK_MAX_LINKS):
            if self._ask(nvml.nvmlDeviceGetNvLinkState, handle, number) != nvml.NVML_FEATURE_ENABLED:
                continue
            remote = self._ask(nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, number)
            ends.append(_text(remote.busId) if remote is not None else "")
        return ends

    # What changes.

    def _measure(self, card: _Card) -> list[DeviceMeasure]:
        nvml = self._nvml
        if card.handle is None:
            return [DeviceMeasure(card.device_id, Health.LOST, _LOST_MESSAGE)]
        try:
            # Which call a lost card refuses first differs from driver to driver; each of them may say so.
            health, message = self._health(card.handle)
            temperature = self._try(nvml.nvmlDeviceGetTemperature, card.handle, nvml.NVML_TEMPERATURE_GPU)
            corrected = self._errors(card.handle, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED)
            uncorrected = self._errors(card.handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)
            measures = []
            for device_id, handle in (card.slices or {card.device_id: card.handle}).items():
                memory = self._try(nvml.nvmlDeviceGetMemoryInfo, handle)
                rates = None if card.slices else self._try(nvml.nvmlDeviceGetUtilizationRates, handle)
                measure = DeviceMeasure(
                    device_id,
                    health=health,
                    health_message=message,
                    used_bytes=memory.used if memory is not None else None,
                    total_bytes=memory.total if memory is not None else None,
                    utilization_ratio=rates.gpu / 100 if rates is not None else None,
                    temperature_celsius=temperature,
                    corrected_error_count=corrected,
                    uncorrected_error_count=uncorrected,
                )
                measures.append(measure)
        except nvml.NVMLError as error:
            is_reset = error.value == nvml.NVML_ERROR_RESET_REQUIRED
            health, message = (Health.DEGRADED, "it needs a reset") if is_reset else (Health.LOST, _LOST_MESSAGE)
            return [DeviceMeasure(name, health, message) for name in card.slices or (card.device_id,)]
        return measures

    def _health(self, handle: Any) -> tuple[Health, str]:
        nvml = self._nvml
        uncorrected = self._errors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)
        rows = self._try(nvml.nvmlDeviceGetRemappedRows, handle)
        if rows is not None and rows[_FAILED]:
            return Health.DEGRADED, "a row of its memory could not be replaced: exchange the card"
        if rows is not None and rows[_PENDING]:
            return Health.DEGRADED, "a row of its memory is to be replaced: reset it"
        if uncorrected:
            return Health.DEGRADED, f"{uncorrected} memory errors could not be corrected: reset it"
        return Health.HEALTHY, ""

    def _errors(self, handle: Any, kind: int) -> int | None:
        return self._try(self._nvml.nvmlDeviceGetTotalEccErrors, handle, kind, self._nvml.NVML_VOLATILE_ECC)

    def _try(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """Asks; None for what the device can't say. Raises NVMLError for a device that is lost or needs a reset."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            if error.value in (self._nvml.NVML_ERROR_GPU_IS_LOST, self._nvml.NVML_ERROR_RESET_REQUIRED):
                raise
            return None

    def _ask(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """Asks; None for whatever can't be told."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None


def _text(value: str | bytes) -> str:
    # Older releases of the library return bytes.
    return value.decode() if isinstance(value, bytes) else value
