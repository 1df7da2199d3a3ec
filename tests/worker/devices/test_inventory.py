"""What NVML and the kernel tell becomes devices, health and measures; the cards are recordings."""

from pathlib import Path

import pytest

from helios.mesh.errors import Overloaded
from helios.worker.devices.host import HostInventory
from helios.worker.devices.nvml import NvmlInventory
from helios.worker.supervisor.ledger import Ledger
from helios.worker.supervisor.records import Device, DeviceMeasure, Health, LinkKind
from tests.worker.devices.nvml_recording import RecordedNvml

GIB = 1 << 30


def opened(nvml: RecordedNvml, sysfs: Path = Path("/nonexistent")) -> NvmlInventory:
    inventory = NvmlInventory.open(nvml, memory_ratio=0.9, sysfs=sysfs)
    assert inventory is not None
    return inventory


def measures(inventory: NvmlInventory) -> dict[str, DeviceMeasure]:
    return {measure.device_id: measure for measure in inventory.measure()}


def ledger(devices: tuple[Device, ...], measured: tuple[DeviceMeasure, ...]) -> Ledger:
    book = Ledger(devices, slot_count=8, base_port=9000, pick_port=lambda _: 1)
    for measure in measured:
        book.note(measure)
    return book


def test_a_node_of_eight_cards_behind_nvswitch(tmp_path: Path) -> None:
    for bus, node in (("0000:1b:00.0", "0"), ("0000:9d:00.0", "1"), ("0000:c3:00.0", "-1")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "numa_node").write_text(f"{node}\n")
    inventory = opened(RecordedNvml("h100x8"), tmp_path)
    devices = inventory.devices()
    assert [device.device_id for device in devices] == [f"cuda:{n}" for n in range(8)]
    first = devices[0]
    assert first.memory_bytes == int(85_520_809_984 * 0.9)
    assert (first.facts.name, first.facts.compute_capability) == ("NVIDIA H100 80GB HBM3", "9.0")
    assert first.facts.uuid.startswith("GPU-")
    assert {(link.kind, link.link_count) for link in first.facts.links} == {(LinkKind.NVLINK, 18)}
    assert [link.device_id for link in first.facts.links] == [f"cuda:{n}" for n in range(1, 8)]
    assert (first.facts.numa_node, devices[4].facts.numa_node, devices[5].facts.numa_node) == (0, 1, None)
    measured = measures(inventory)
    busy = measured["cuda:4"]
    assert (busy.utilization_ratio, busy.temperature_celsius, busy.used_bytes) == (0.97, 66, 72_145_174_528)
    assert {measure.health for measure in measured.values()} == {Health.HEALTHY}
    assert measured["cuda:2"].corrected_error_count == 2
    assert inventory.process_bytes(frozenset({4321, 99})) == 71_572_127_744
    assert inventory.process_bytes(frozenset({99})) is None
    inventory.close()


def test_slices_are_the_devices_of_a_card_that_is_cut() -> None:
    inventory = opened(RecordedNvml("a100_mig"))
    devices = inventory.devices()
    assert [device.device_id for device in devices] == [f"cuda:0/mig:{n}" for n in range(4)]
    assert [device.facts.mig_profile for device in devices] == ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"]
    assert all(device.facts.uuid.startswith("MIG-") for device in devices)
    assert {device.facts.parent_device_id for device in devices} == {"cuda:0"}
    assert devices[0].memory_bytes == int(42_144_366_592 * 0.9)
    measured = measures(inventory)["cuda:0/mig:1"]
    # A slice has no utilisation of its own; temperature and errors are the card's.
    assert (measured.utilization_ratio, measured.temperature_celsius, measured.total_bytes) == (
        None,
        38,
        20_937_965_568,
    )


def test_cards_that_are_lost_or_have_errors_are_told_and_nothing_is_booked_on_them() -> None:
    inventory = opened(RecordedNvml("faulty"))
    measured = measures(inventory)
    assert {name: measure.health for name, measure in measured.items()} == {
        "cuda:0": Health.LOST,
        "cuda:1": Health.DEGRADED,
        "cuda:2": Health.DEGRADED,
        "cuda:3": Health.HEALTHY,
    }
    assert "3 memory errors" in measured["cuda:1"].health_message
    assert "to be replaced" in measured["cuda:2"].health_message
    assert measured["cuda:3"].uncorrected_error_count is None
    book = ledger(inventory.devices(), inventory.measure())
    assert book.book("a", 20 * GIB).device_ids == ("cuda:3",)
    with pytest.raises(Overloaded):
        book.book("b", 2 * GIB)


def test_ways_without_nvlink_are_told_apart() -> None:
    devices = opened(RecordedNvml("faulty")).devices()
    assert {link.device_id: link.kind for link in devices[2].facts.links} == {
        "cuda:1": LinkKind.SYSTEM,
        "cuda:3": LinkKind.PCIE_SWITCH,
    }


def test_a_card_that_falls_off_the_bus_is_lost_alone() -> None:
    nvml = RecordedNvml("h100x8")
    inventory = opened(nvml)
    book = ledger(inventory.devices(), inventory.measure())
    assert book.book("gang", 8 * GIB, device_ids=("cuda:5", "cuda:6")).device_ids == ("cuda:5", "cuda:6")
    nvml.lose("gpu5")
    lost = {name: m for name, m in measures(inventory).items() if m.health is not Health.HEALTHY}
    assert list(lost) == ["cuda:5"]
    assert book.note(lost["cuda:5"]) == ("gang",)


def test_all_slices_of_a_lost_card_are_lost() -> None:
    nvml = RecordedNvml("a100_mig")
    inventory = opened(nvml)
    nvml.lose("gpu0")
    assert {measure.health for measure in inventory.measure()} == {Health.LOST}
    assert len(inventory.measure()) == 4


def test_a_driver_that_does_not_answer_is_no_inventory() -> None:
    nvml = RecordedNvml("h100x8")
    nvml.answers["nvmlInit"][""] = {"error": nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}
    assert NvmlInventory.open(nvml, memory_ratio=0.9) is None


def test_the_host_is_one_device_whose_memory_the_cgroup_bounds(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/pod\n")
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 4194304 kB\n")
    (tmp_path / "stat").write_text("cpu  100 0 100 800 0 0 0 0 0 0\n")
    cgroups = tmp_path / "cgroups"
    (cgroups / "pod").mkdir(parents=True)
    (cgroups / "pod" / "memory.max").write_text(f"{8 * GIB}\n")
    inventory = HostInventory(None, proc=tmp_path, cgroups=cgroups)
    (device,) = inventory.devices()
    assert device.memory_bytes == int(8 * GIB * 0.6)
    (first,) = inventory.measure()
    assert (first.used_bytes, first.total_bytes, first.utilization_ratio) == (4 * GIB, 8 * GIB, None)
    (tmp_path / "stat").write_text("cpu  150 0 100 850 0 0 0 0 0 0\n")
    assert inventory.measure()[0].utilization_ratio == 0.5
