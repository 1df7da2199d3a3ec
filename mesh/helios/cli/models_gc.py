"""``helios models gc``: removes blobs that nothing refers to from the registry's store."""

import json
from dataclasses import asdict, dataclass
from datetime import timedelta

from rich.console import Console

from helios.cli.edge import open_admin
from helios.cli.state import StateDirectory
from helios.registry.client import CollectionReport, RegistryClient

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """How ``helios models gc`` collects.

    Attributes:
        is_dry_run: Only say what would go.
        grace_seconds: What is younger stays; None: the registry's setting.
        is_json: Print the report as JSON.
    """

    is_dry_run: bool
    grace_seconds: float | None
    is_json: bool


async def models_gc(state: StateDirectory, console: Console, options: CollectOptions) -> None:
    """Collects, and says what went and what stayed."""
    grace = None if options.grace_seconds is None else timedelta(seconds=options.grace_seconds)
    async with open_admin(state) as dialer:
        report = await RegistryClient(dialer).collect_blobs(is_dry_run=options.is_dry_run, grace=grace)
    if options.is_json:
        console.print_json(json.dumps(asdict(report) | {"dry_run": options.is_dry_run}))
        return
    for line in describe(report, is_dry_run=options.is_dry_run):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe(report: CollectionReport, *, is_dry_run: bool) -> list[str]:
    """Returns a report in words."""
    would = "would be removed" if is_dry_run else "removed"
    removed = f"{report.removed_count} blob(s), {_size(report.removed_bytes)}"
    used = f"{report.reachable_count} blob(s), {_size(report.reachable_bytes)}"
    spared = f"{report.spared_count}, {_size(report.spared_bytes)}"
    lines = [
        f"{removed}, and {report.unfinished_count} unfinished upload(s) {would}",
        f"{used}, are in use; {spared}, are young or being ingested",
    ]
    if report.missing:
        shown = ", ".join(value[:12] for value in report.missing[:5])
        lines.append(f"{report.missing_count} blob(s) are MISSING ({shown}…): add their models again")
    return lines


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"
