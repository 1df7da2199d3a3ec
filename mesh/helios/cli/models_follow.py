"""``helios models follow``, and ``--follow`` of ``add`` and ``pull``: a source that changes is pulled again."""

import json
import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4

from rich.console import Console
from rich.table import Table
from rich.text import Text

from helios.cli.edge import open_admin
from helios.cli.options import NOTHING_DONE
from helios.cli.state import StateDirectory
from helios.mesh.channel import StubSource
from helios.mesh.errors import InvalidRequest, NotFound
from helios.registry.client import FollowClient, Following, FollowPolicy, Wish

_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Manner:
    """How a source is followed; what is not said stays as it is, or is the registry's own choice."""

    interval: str = ""
    policy: str = ""
    weight: int | None = None

    def apply(self, wish: Wish) -> Wish:
        """Returns what is to be followed, in this manner. Raises InvalidRequest."""
        if self.interval:
            wish = replace(wish, interval=read_span(self.interval))
        if self.policy:
            if self.policy not in set(FollowPolicy):
                known = ", ".join(FollowPolicy)
                raise InvalidRequest(f"no such policy: {self.policy}; there is {known}", reason="INVALID_ARGUMENT")
            wish = replace(wish, policy=FollowPolicy(self.policy))
        if self.weight is not None:
            wish = replace(wish, weight_percent=self.weight)
        if wish.policy is FollowPolicy.ROLLOUT and not wish.weight_percent:
            raise InvalidRequest("the policy rollout needs --weight, in percent", reason="INVALID_ARGUMENT")
        return wish


@dataclass(frozen=True, slots=True)
class Order:
    """What ``helios models follow`` is to do; nothing: only show. A dry run shows what would be."""

    source: str = ""
    manner: Manner = Manner()
    is_stopped: bool = False
    is_now: bool = False
    is_dry_run: bool = False


async def follow(state: StateDirectory, console: Console, model: str, order: Order, *, is_json: bool) -> None:
    """Changes what a model follows, or shows it."""
    if order.is_stopped and (order.source or order.is_now or order.manner != Manner()):
        raise InvalidRequest("--stop goes with nothing else", reason="INVALID_ARGUMENT")
    async with open_admin(state) as dialer:
        client = FollowClient(dialer)
        if order.is_stopped:
            await client.remove(model, request_id=uuid4().hex, is_dry_run=order.is_dry_run)
            found = None
        elif order.source or order.manner != Manner():
            before = None if order.source else (await client.get(model)).wish
            wish = Wish(order.source) if before is None else before
            wish = order.manner.apply(wish)
            found = await client.put(model, wish, request_id=uuid4().hex, is_dry_run=order.is_dry_run)
        else:
            is_look = order.is_now and not order.is_dry_run
            found = await (client.look_now(model) if is_look else client.get(model))
    if is_json:
        console.print_json(json.dumps(document_of(found)))
        return
    if order.is_dry_run:
        console.print(NOTHING_DONE.rstrip())
    if found is None:
        console.print(f"{model} follows no source", markup=False, highlight=False)
    else:
        table = Table(show_header=False, box=None)
        for key, value in document_of(found).items():
            table.add_row(key, Text(json.dumps(value) if isinstance(value, list) else str(value)))
        console.print(table)


async def follow_new(dialer: StubSource, model: str, wish: Wish) -> Following:
    """Makes a model that was just pulled follow its source."""
    return await FollowClient(dialer).put(model, wish, request_id=uuid4().hex)


async def following_of(dialer: StubSource, model: str) -> dict[str, Any]:
    """Returns what a model follows, for JSON; empty where that is nothing."""
    try:
        return document_of(await FollowClient(dialer).get(model))
    except NotFound as error:
        if error.reason != "NOT_FOLLOWED":
            raise
        return {}


def document_of(found: Following | None) -> dict[str, Any]:
    """Returns what is followed, and how that went, for JSON."""
    if found is None:
        return {}
    wish = found.wish
    return {
        "model": found.model,
        "source": wish.source,
        "include": list(wish.include),
        "exclude": list(wish.exclude),
        "interval_seconds": wish.interval.total_seconds(),
        "policy": wish.policy.value,
        "weight_percent": wish.weight_percent,
        "checked_at": _moment(found.checked_at),
        "changed_at": _moment(found.changed_at),
        "next_at": _moment(found.next_at),
        "error": found.error,
        "error_reason": found.error_reason,
        "failure_count": found.failure_count,
    }


def read_span(text: str) -> timedelta:
    """Reads ``90s``, ``15m``, ``1h`` or ``7d``. Raises InvalidRequest."""
    match = _SPAN.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{text!r} is no time: 90s, 15m, 1h or 7d", reason="INVALID_INTERVAL")
    return timedelta(seconds=float(match[1]) * _UNITS[match[2]])


def _moment(moment: datetime | None) -> str:
    return moment.isoformat(timespec="seconds") if moment is not None else ""
