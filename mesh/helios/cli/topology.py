"""Which processes make a mesh on one machine, with which settings: plain data, decided before anything starts.

Processes meet over unix sockets in the state directory: their addresses are known before they start, survive restarts
and clash with nobody. Replicas listen on TCP, because Envoy addresses them by ``ip:port``.
"""

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import Mapping
from copy import deepcopy
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from helios.cli.certificates import identity_of
from helios.cli.children import ChildSpec
from helios.cli.state import StateDirectory
from helios.mesh.envoy.process import command
from helios.mesh.envoy.settings import EdgeSettings, Limits
from helios.mesh.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    from helios.cli.up import UpOptions

EMBEDDED_MODEL: Final = "smollm2-135m-instruct"
EMBEDDED_SOURCES: Final = {EMBEDDED_MODEL: f"embedded:{EMBEDDED_MODEL}"}
EMBEDDED_ALIASES: Final = {EMBEDDED_MODEL: ("smollm2",)}

PROCESSES: Final = ("registry", "storage", "proxy", "relay", "worker")
# Where the module of a process is not called as the process.
_MODULES: Final = {"relay": "proxy.relay"}
# Envoy's wait for the picker is 30 s longer than the proxy's longest hold (helios.mesh.envoy.settings.Limits).
_ACTIVE_REQUESTS: Final = re.compile(
    r"^envoy_http_downstream_rq_active\{[^}]*prefix=\"(?:edge|admin)_listener\"[^}]*\} (\d+)", re.MULTILINE
)
_DRAIN_POLL_SECONDS: Final = 0.05
# Each is a process of some 100 MiB; of what a machine has cores for, engines want most.
_MOST_PICKERS: Final = 16
# From SIGTERM to SIGKILL.
_PROCESS_STOP_SECONDS: Final = 15.0
_ENVOY_STOP_SECONDS: Final = 5.0

Settings = dict[str, dict[str, Any]]


def default_state_directory() -> Path:
    """Returns ``$XDG_STATE_HOME/helios``, by default (and where that is relative, as XDG says)
    ``~/.local/state/helios``.
    """
    base = os.environ.get("XDG_STATE_HOME", "")  # noqa: TID251 - the XDG specification names the variable
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state") / "helios"


def settings_of(options: "UpOptions") -> Settings:
    """Returns the settings of each process, the user's overrides applied. Raises InvalidRequest for a bad override."""
    settings = _defaults(options.state, options.proxies)
    if not ip_address(options.host.strip("[]")).is_loopback:
        # Else an address that others can reach would serve anybody.
        settings["proxy"]["admission"] = {"require_keys": True}
    for override in options.overrides:
        _apply(settings, override)
    return settings


def requires_keys(settings: Settings) -> bool:
    """Whether requests need an API key, as the proxy will read it."""
    return settings["proxy"].get("admission", {}).get("require_keys") is True


def children(state: StateDirectory, settings: Settings, options: "UpOptions") -> list[ChildSpec]:
    """Returns how to start each process; writes Envoy's configuration."""
    proxies = _proxies(state, settings, options.proxies)
    specs = [
        _python_process(state, name, instance)
        for process in PROCESSES
        for name, instance in (proxies if process == "proxy" else {process: settings[process]}).items()
    ]
    return [*specs, _envoy(state, settings, proxies, options)]


def component_of(process: str) -> str:
    """Returns what a process is an instance of: ``proxy-2`` is a proxy."""
    name, _, number = process.rpartition("-")
    return name if number.isdecimal() else process


def _proxy_names(count: int) -> tuple[str, ...]:
    return ("proxy", *(f"proxy-{number}" for number in range(2, count + 1)))


def _picker_names(settings: Settings, count: int) -> dict[str, str]:
    """Returns further picker processes, each with the proxy that it belongs to. Raises InvalidRequest."""
    each = str(settings["proxy"].get("pickers", 1))
    if not each.isdecimal() or not 1 <= int(each) * count <= _MOST_PICKERS:
        raise InvalidRequest(f"proxy.pickers is 1 to {_MOST_PICKERS // count} with {count} proxies, not {each}")
    proxies = _proxy_names(count)
    return {f"proxy-{number + 1}": proxies[number % count] for number in range(count, count * int(each))}


def _proxies(state: StateDirectory, settings: Settings, count: int) -> Settings:
    """Returns the settings of each proxy by the name of its process: all of them the user's, but for what is its own.

    One proxy is what it is without this; of several, each has its sockets, its directory, and its cluster at Envoy.
    Picker processes are proxies that hear from another one what workers say.
    """
    pickers = _picker_names(settings, count)
    if count == 1 and not pickers:
        return {"proxy": settings["proxy"]}
    # Most of a second of every command: see _envoy.
    from helios.mesh.envoy.settings import replica_cluster  # noqa: PLC0415

    return {
        name: settings["proxy"]
        | {
            "proxy_id": name,
            "state_directory": state.component(name),
            "control_listen": _control(state, name),
            "picker_listen": _picker(state, name),
            "replica_cluster": replica_cluster(name),
            "peers": settings["proxy"].get("peers", {}) | {"lease": True},
        }
        | ({"feed_target": _control(state, pickers[name])} if name in pickers else {})
        for name in (*_proxy_names(count), *pickers)
    }


def _control(state: StateDirectory, proxy: str) -> str:
    return f"unix:{state.sockets / proxy.replace('proxy', 'control')}.sock"


def _picker(state: StateDirectory, proxy: str) -> str:
    return f"unix:{state.sockets / proxy.replace('proxy', 'picker')}.sock"


async def drain_envoy(state: StateDirectory, deadline: float) -> None:
    """Lets Envoy take no new connections and returns when its requests have ended, at the deadline
    (``time.monotonic()``) otherwise.
    """
    from helios.mesh.envoy.admin import EnvoyAdmin  # noqa: PLC0415 - see _envoy

    with contextlib.suppress(Unavailable, TimeoutError):
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())), EnvoyAdmin(_envoy_admin(state)) as admin:
            await admin.drain()
            while True:
                if sum(map(int, _ACTIVE_REQUESTS.findall(await admin.prometheus()))) == 0:
                    return
                await asyncio.sleep(_DRAIN_POLL_SECONDS)


def _defaults(state: StateDirectory, proxy_count: int) -> Settings:
    sockets = state.sockets
    registry, storage = f"unix:{sockets / 'registry.sock'}", f"unix:{sockets / 'storage.sock'}"
    specific: Settings = {
        "registry": {"state_directory": state.component("registry"), "listen": registry},
        "storage": {"state_directory": state.component("storage"), "listen": storage, "registry_target": registry},
        "proxy": {
            "state_directory": state.component("proxy"),
            "control_listen": _control(state, "proxy"),
            "picker_listen": _picker(state, "proxy"),
            "registry_target": registry,
        },
        "relay": {
            "listen": f"unix:{sockets / 'relay.sock'}",
            "proxies": [_control(state, name) for name in _proxy_names(proxy_count)],
        },
        "worker": {
            "state_directory": state.component("worker"),
            "supervisor_listen": f"unix:{sockets / 'supervisor.sock'}",
            "storage_target": storage,
            "registry_target": registry,
            "proxies": [_control(state, name) for name in _proxy_names(proxy_count)],
            "log_directory": state.logs,
        },
        "envoy": {},
    }
    for name in PROCESSES:
        specific[name]["mesh"] = {"tls": "files", "identity_directory": identity_of(state, name).directory}
    return specific


def _apply(settings: Settings, override: str) -> None:
    path, equals, value = override.partition("=")
    component, dot, field = path.partition(".")
    if not equals or not dot or component not in settings:
        raise InvalidRequest(
            f"--set {override}: write COMPONENT.FIELD=VALUE, with a component of {', '.join(settings)}; "
            "`python -m helios.COMPONENT --help` lists its fields"
        )
    *parents, leaf = field.replace("-", "_").split(".")
    place = settings[component]
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise InvalidRequest(f"--set {override}: {parent} is a value, it has no fields")
    # A flag that is on or off takes no value (helios.mesh.settings).
    place[leaf] = {"true": True, "false": False}.get(value.lower(), value)


def _python_process(state: StateDirectory, name: str, settings: Mapping[str, Any]) -> ChildSpec:
    from helios.mesh.settings import to_arguments  # noqa: PLC0415 - see _envoy

    component = component_of(name)
    ready = state.run / f"{name}.ready.json"
    flags = to_arguments(deepcopy(dict(settings)))
    arguments = [sys.executable, "-m", f"helios.{_MODULES.get(component, component)}", f"--ready-file={ready}", *flags]
    # A worker drains its replicas first, which takes as long as its own setting allows (30: helios.worker.settings).
    drain_seconds = _number(settings, "replica", "drain_seconds", 30.0) if name == "worker" else 0.0
    return ChildSpec(
        name,
        arguments,
        state.logs / f"{name}.log",
        ready_path=ready,
        stop_seconds=drain_seconds + _PROCESS_STOP_SECONDS,
    )


def _envoy(state: StateDirectory, settings: Settings, proxies: Settings, options: "UpOptions") -> ChildSpec:
    # Most of a second of every command (aiohttp, Envoy's messages, pydantic), for what only `up` needs.
    from helios.mesh.envoy.admin import EnvoyAdmin  # noqa: PLC0415
    from helios.mesh.envoy.bootstrap import install  # noqa: PLC0415

    edge = EdgeSettings(
        directory=state.component("envoy"),
        envoy_admin=_envoy_admin(state),
        admin_token=state.admin_token(),
        picker=tuple(proxy["picker_listen"] for proxy in proxies.values()),
        feeds=tuple((name, proxy["picker_listen"]) for name, proxy in proxies.items() if len(proxies) > 1),
        control=tuple(proxy["control_listen"] for proxy in proxies.values() if "feed_target" not in proxy),
        registry=(settings["registry"]["listen"],),
        relay=(settings["relay"]["listen"],),
        edge_identity=identity_of(state, "edge"),
        admin_identity=identity_of(state, "admin-edge"),
        edge_host=options.host,
        edge_port=options.port,
        admin_port=options.admin_port,
        access_log=state.logs / "access.log",
        otlp_endpoint=settings["envoy"].get("otlp_endpoint"),
        # 300: the proxy's own default (helios.proxy.settings).
        limits=Limits(hold_limit_seconds=_number(settings["proxy"], "hold", "limit_seconds", 300.0)),
    )

    async def is_serving() -> bool:
        async with EnvoyAdmin(_envoy_admin(state)) as admin:
            return await admin.is_ready()

    return ChildSpec(
        "envoy",
        command(install(edge)),
        state.logs / "envoy.log",
        probe=is_serving,
        # It was drained before, and ends its connections at once.
        stop_seconds=_ENVOY_STOP_SECONDS,
    )


def _number(settings: Mapping[str, Any], group: str, field: str, default: float) -> float:
    """Returns a number that was set for a process, or what the process itself would take."""
    try:
        return float(settings.get(group, {}).get(field, default))
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequest(f"--set COMPONENT.{group}.{field}=SECONDS takes a number") from error


def _envoy_admin(state: StateDirectory) -> str:
    return f"unix:{state.sockets / 'envoy-admin.sock'}"
