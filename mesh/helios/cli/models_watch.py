"""``helios models watch``: each change of models as it comes, or since a version, also over a registry's restart."""

import asyncio
import json
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from rich.console import Console

from helios.cli.edge import open_admin
from helios.cli.model_versions import short
from helios.cli.state import StateDirectory
from helios.mesh.errors import Unavailable
from helios.registry.client import Event, EventsMissed, VersionClient

# A registry that restarts is back in a second or two.
_PAUSE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """What ``helios models watch`` shows.

    Attributes:
        model: Only changes of the model with this name; empty: of all.
        after_version: Begin after this change; None: with the next one.
        count: End after so many changes; 0: never.
        is_json: Print a line of JSON for each.
    """

    model: str
    after_version: int | None
    count: int
    is_json: bool


async def models_watch(state: StateDirectory, console: Console, options: WatchOptions) -> None:
    """Prints changes until their count is reached. Nothing is missed where the registry is away for a while.

    Raises:
        Unavailable: There was nobody to begin with.
    """
    version, left = options.after_version, options.count
    async with open_admin(state) as dialer:
        while True:
            try:
                async with aclosing(VersionClient(dialer).watch_events(version)) as events:
                    async for event in events:
                        version = event.version
                        if isinstance(event, Event) and options.model not in ("", event.model):
                            continue
                        console.print(
                            _line(event, is_json=options.is_json), markup=False, highlight=False, soft_wrap=True
                        )
                        left -= 1
                        if left == 0:
                            return
            except Unavailable:
                # Where nothing has come yet, what changes meanwhile can't be asked for.
                if version is None:
                    raise
                await asyncio.sleep(_PAUSE_SECONDS)


def _line(event: Event | EventsMissed, *, is_json: bool) -> str:
    """Returns a change on one line."""
    if isinstance(event, EventsMissed):
        if is_json:
            return json.dumps({"missed_to": event.version})
        return f"changes up to {event.version} are not known any more; what came after follows"
    if is_json:
        return json.dumps(
            {
                "version": event.version,
                "kind": event.kind.value,
                "model": event.model,
                "detail": dict(event.detail),
                "actor": event.actor,
                "at": event.at.isoformat(timespec="milliseconds"),
            }
        )
    detail = " ".join(
        f"{name}={short(value) if name == 'revision' else value}"
        for name, value in sorted(event.detail.items())
        if value
    )
    who = f" by {event.actor}" if event.actor else ""
    return (
        f"{event.at.astimezone():%H:%M:%S} {event.version:>6} {event.kind.value:<18} {event.model} {detail}".rstrip()
        + who
    )
