"""Small conversions between our words and Envoy's messages."""

from datetime import timedelta
from pathlib import Path

import betterproto2
from envoy_data_plane.envoy.config.core.v3 import Address, Http2ProtocolOptions, KeepaliveSettings, Pipe, SocketAddress
from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig as Extension
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.google.protobuf import Any, Struct, Value

from helios.mesh.errors import InvalidRequest


def extension(name: str, message: betterproto2.Message) -> Extension:
    """Wraps a message as a named extension."""
    return Extension(name=name, typed_config=Any.pack(message))


def http_filter(name: str, message: betterproto2.Message) -> HttpFilter:
    """Wraps a message as an HTTP filter."""
    return HttpFilter(name=name, typed_config=Any.pack(message))


def seconds(value: float) -> timedelta:
    """Returns a duration."""
    return timedelta(seconds=value)


def address(text: str, *, socket_mode: int = 0) -> Address:
    """Reads "ip:port", "[ip]:port" or "unix:/path"; ``socket_mode`` is for a path that Envoy binds.

    Raises:
        InvalidRequest: It has another form, or the path is longer than a socket address holds.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        # sun_path is 108 bytes with the final zero.
        if not path.startswith("/") or len(path.encode()) > 107:
            raise InvalidRequest(
                f"{path}: a unix socket's path is absolute and at most 107 bytes; choose a shorter state directory"
            )
        return Address(pipe=Pipe(path=path, mode=socket_mode))
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"{text!r} is not an address of the form ip:port or unix:/path")
    return Address(socket_address=SocketAddress(address=host.strip("[]"), port_value=int(port)))


def struct(fields: dict[str, str]) -> Struct:
    """Returns a struct of strings."""
    return Struct(fields={key: Value(string_value=value) for key, value in fields.items()})


def http2(
    *, keepalive_seconds: float, timeout_seconds: float, max_outbound_frames: int | None = None
) -> Http2ProtocolOptions:
    """Returns HTTP/2 options whose pings find a peer that is gone without a word.

    With more than ``max_outbound_frames`` in its queue Envoy breaks the connection; None is Envoy's 10,000.
    """
    pings = KeepaliveSettings(interval=seconds(keepalive_seconds), timeout=seconds(timeout_seconds))
    return Http2ProtocolOptions(connection_keepalive=pings, max_outbound_frames=max_outbound_frames)


def absolute(path: Path) -> str:
    """Returns the path as Envoy needs it, whatever directory it is started in."""
    return str(path.absolute())
