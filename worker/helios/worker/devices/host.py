"""The host as a device, where there is no GPU."""

from pathlib import Path

from helios.worker.supervisor.host import CPU_DEVICE, cpu_device, usable_memory_bytes, used_memory_bytes
from helios.worker.supervisor.measuring import private_bytes
from helios.worker.supervisor.records import Device, DeviceMeasure


class HostInventory:
    """One CPU device. ``proc`` and ``cgroups`` are where the kernel tells."""

    def __init__(
        self, memory_bytes: int | None, *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
    ) -> None:
        self._memory_bytes = memory_bytes
        self._proc = proc
        self._cgroups = cgroups
        self._busy: tuple[int, int] | None = None

    def devices(self) -> tuple[Device, ...]:
        """Returns the host."""
        return (cpu_device(self._memory_bytes, proc=self._proc, cgroups=self._cgroups),)

    def measure(self) -> tuple[DeviceMeasure, ...]:
        """Measures memory, and how busy the processors were since the last call."""
        measure = DeviceMeasure(
            CPU_DEVICE,
            used_bytes=used_memory_bytes(self._proc, self._cgroups),
            total_bytes=usable_memory_bytes(self._proc, self._cgroups),
            utilization_ratio=self._utilization(),
        )
        return (measure,)

    def process_bytes(self, pids: frozenset[int]) -> int | None:
        """Returns the private memory of processes."""
        return private_bytes(pids, self._proc)

    def close(self) -> None:
        """There is nothing to let go."""

    def _utilization(self) -> float | None:
        # user nice system idle iowait irq softirq steal. Source: proc_stat(5).
        ticks = [int(field) for field in (self._proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        before, self._busy = self._busy, (sum(ticks) - ticks[3] - ticks[4], sum(ticks))
        if before is None or self._busy[1] <= before[1]:
            return None
        return (self._busy[0] - before[0]) / (self._busy[1] - before[1])
