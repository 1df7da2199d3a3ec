"""``helios keys``: API keys of clients."""

import json
import re
from datetime import datetime, timedelta
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from helios.cli.edge import open_admin
from helios.cli.state import StateDirectory
from helios.mesh.errors import InvalidRequest
from helios.registry.client import ApiKey, KeyClient, KeySpec, Priority

_DURATION: Final = re.compile(r"(\d{1,6})([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


async def create(state: StateDirectory, console: Console, spec: KeySpec, *, is_json: bool) -> None:
    """Makes a key and prints its secret, which is not to be had again."""
    async with open_admin(state) as dialer:
        key, secret = await KeyClient(dialer).create(spec)
    if is_json:
        console.print_json(json.dumps(_fields(key) | {"secret": secret}))
        return
    # Alone on its line, so that a script can take it.
    console.print(secret, markup=False, highlight=False, soft_wrap=True)
    ends = f"it ends {_moment(key.expires_at)}" if key.expires_at else "it does not end by itself"
    told = f"{key.name} ({key.id}) for {', '.join(key.models) or 'all models'}; {ends}. It is shown this once."
    console.print(told, style="dim", markup=False, highlight=False, soft_wrap=True)


async def list_keys(state: StateDirectory, console: Console, *, show_ended: bool, is_json: bool) -> None:
    """Prints the keys, the newest first."""
    async with open_admin(state) as dialer:
        keys = await KeyClient(dialer).list(show_ended=show_ended)
    if is_json:
        console.print_json(json.dumps([_fields(key) for key in keys]))
        return
    if not keys:
        console.print("no keys; `helios keys create NAME` makes one", style="dim")
        return
    table = Table(box=None)
    for title in ("NAME", "ID", "TENANT", "MODELS", "REQUESTS/MIN", "TOKENS/MIN", "PRIORITY", "MADE", "ENDS"):
        table.add_column(title, overflow="fold")
    for key in keys:
        revoked = f"revoked {_moment(key.revoked_at)}" if key.revoked_at else ""
        table.add_row(
            key.name,
            key.id,
            key.tenant if key.weight == 1 else f"{key.tenant} x{key.weight}",
            ", ".join(key.models) or "all",
            str(key.requests_per_minute or "-"),
            str(key.tokens_per_minute or "-"),
            key.priority.name.lower(),
            _moment(key.created_at),
            revoked or (_moment(key.expires_at) if key.expires_at else "-"),
        )
    console.print(table)


async def revoke(state: StateDirectory, console: Console, key: str, *, is_json: bool) -> None:
    """Ends a key."""
    async with open_admin(state) as dialer:
        revoked = await KeyClient(dialer).revoke(key)
    if is_json:
        console.print_json(json.dumps(_fields(revoked)))
        return
    console.print(f"{revoked.name} ({revoked.id}) is revoked", markup=False, highlight=False)


def priority_of(text: str) -> Priority:
    """Reads a priority. Raises InvalidRequest."""
    try:
        return Priority[text.upper()]
    except KeyError as error:
        raise InvalidRequest(f"--priority is low, normal or high, not {text!r}") from error


def duration_of(text: str) -> timedelta | None:
    """Reads a time such as "30d"; empty is none. Raises InvalidRequest."""
    if not text:
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"--expires takes a time from now, such as 90s, 15m, 12h or 30d, not {text!r}")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _fields(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "tenant": key.tenant,
        "models": list(key.models),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "priority": key.priority.name.lower(),
        "weight": key.weight,
        "created_at": key.created_at.isoformat(),
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
        "revoked_at": key.revoked_at.isoformat() if key.revoked_at else None,
    }


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}Z"
