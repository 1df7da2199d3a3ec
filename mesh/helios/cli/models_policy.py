"""``helios models policy``: how many replicas a model has and when, how warm they are kept, which takes a request."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from rich.console import Console

from helios.cli.edge import open_admin
from helios.cli.models_follow import read_span
from helios.cli.options import NOTHING_DONE
from helios.cli.state import StateDirectory
from helios.mesh.errors import InvalidRequest
from helios.mesh.routing import NAMES, Choice, ModelRouting
from helios.mesh.windows import Window
from helios.registry.client import ModelPolicy, RegistryClient

_USUAL: Final = "usual"


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """What of a policy is to be another; None and empty: it stays."""

    least: int | None = None
    most: int | None = None
    idle: str = ""
    asleep: str = ""
    staged: str = ""
    windows: tuple[str, ...] = ()
    has_no_windows: bool = False
    routing: tuple[str, ...] = ()

    def apply(self, policy: ModelPolicy) -> ModelPolicy:
        """Returns the policy with the change. Raises InvalidRequest."""
        if self.least is not None:
            policy = replace(policy, min_replicas=self.least)
        if self.most is not None:
            policy = replace(policy, max_replicas=self.most)
        if self.idle:
            policy = replace(policy, idle_seconds=read_time(self.idle))
        if self.asleep:
            policy = replace(policy, asleep_seconds=read_time(self.asleep))
        if self.staged:
            policy = replace(policy, staged_seconds=read_time(self.staged))
        if self.windows or self.has_no_windows:
            policy = replace(policy, windows=tuple(map(read_window, self.windows)))
        for text in self.routing:
            policy = replace(policy, routing=read_routing(text, policy.routing))
        return policy.check()


async def models_policy(
    state: StateDirectory,
    console: Console,
    name: str,
    change: PolicyChange,
    *,
    is_dry_run: bool = False,
    is_json: bool = False,
) -> None:
    """Changes a model's policy, or shows it; a dry run shows what would hold."""
    async with open_admin(state) as dialer:
        registry = RegistryClient(dialer)
        model = await registry.get_model(name)
        policy = change.apply(model.policy)
        if policy != model.policy:
            # It is replaced as a whole: what another person has set meanwhile would be gone.
            model = await registry.update_policy(
                model.name, policy, expected_version=model.version, is_dry_run=is_dry_run
            )
    if is_json:
        console.print_json(json.dumps({"model": model.name, **asdict(model.policy)}))
        return
    if is_dry_run:
        console.print(NOTHING_DONE.rstrip())
    for line in lines_of(model.policy):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def read_time(text: str) -> float | None:
    """Reads ``90s``, ``15m``, ``1h``, ``7d``; 0 is for ever, ``usual`` (None) what the proxies are set to.

    Raises:
        InvalidRequest: It is none of these.
    """
    if text == _USUAL:
        return None
    return 0.0 if text == "0" else read_span(text).total_seconds()


def read_window(text: str) -> Window:
    """Reads ``CRON; SPAN``, and behind it ``min=N``, ``max=N`` and ``zone=NAME`` in any order.

    Raises:
        InvalidRequest: It is something else.
    """
    begins, *rest = (part.strip() for part in text.split(";"))
    fields: dict[str, Any] = {}
    for part in rest[1:]:
        key, _, value = part.partition("=")
        if key == "zone":
            fields["time_zone"] = value
        elif key in ("min", "max") and value.isascii() and value.isdigit():
            fields[f"{key}_replicas"] = int(value)
        else:
            raise _no_window(text)
    if not rest:
        raise _no_window(text)
    return Window(begins, read_span(rest[0]).total_seconds(), **fields)


def read_routing(text: str, routing: ModelRouting) -> ModelRouting:
    """Returns routing with what ``NAME=VALUE`` says of it; the value ``usual`` takes back what was said.

    Raises:
        InvalidRequest: There is no such name, or the value is none of it.
    """
    name, _, value = text.partition("=")
    if name not in NAMES:
        raise InvalidRequest(f"{text!r} is not NAME=VALUE, of {', '.join(NAMES)}", reason="INVALID_POLICY")
    try:
        meant: Any = None if value == _USUAL else Choice(value) if name == "choice" else float(value)
    except ValueError:
        kinds = " or ".join(Choice) if name == "choice" else "a number"
        raise InvalidRequest(f"{name}: {value!r} is not {kinds}, or {_USUAL}", reason="INVALID_POLICY") from None
    return replace(routing, **{name: meant})


def lines_of(policy: ModelPolicy) -> list[str]:
    """Puts a policy into words."""
    lines = [f"replicas: {_bounds(policy.min_replicas, policy.max_replicas)}"]
    for window in policy.windows:
        least = policy.min_replicas if window.min_replicas is None else window.min_replicas
        most = policy.max_replicas if window.max_replicas is None else window.max_replicas
        zone = window.time_zone or "UTC"
        lines.append(f"  from {window.begins} ({zone}) for {_span(window.seconds)}: {_bounds(least, most)}")
    times = (
        ("idle", policy.idle_seconds),
        ("asleep", policy.asleep_seconds),
        ("staged in memory", policy.staged_seconds),
    )
    lines += [f"{name}: {_time(seconds)}" for name, seconds in times]
    said = [f"{name}={value}" for name, value in policy.routing.as_fields().items()]
    return [*lines, f"routing: {', '.join(said) or 'as usual'}"]


def _bounds(least: int, most: int) -> str:
    return f"at least {least}, at most {most or 'what fits'}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "as usual"
    return f"for {_span(seconds)}" if seconds else "for ever"


def _span(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"


def _no_window(text: str) -> InvalidRequest:
    example = "0 8 * * MON-FRI; 10h; min=2; zone=Europe/Berlin"
    return InvalidRequest(f"{text!r} is no window, such as '{example}'", reason="INVALID_POLICY")
