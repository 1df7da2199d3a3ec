"""Ports for servers that tests start."""

import os
import random
import socket
from pathlib import Path

_LOWEST = 15_000
_HIGHEST = 60_999
_TRIES = 1000
# Of this process alone: two that run tests at once must not choose in the same order.
_chance = random.Random(os.urandom(16))
_given: set[int] = set()


def free_port() -> int:
    """Returns a TCP port of loopback that nobody uses now, and that this process has not been given before.

    It lies below the range that the kernel takes for outgoing connections. A port from that range may be taken by any
    connection before its server binds it, and by none more surely than that of a client that waits for the server: TCP
    lets a socket connect to itself, when the kernel gives it the very port that it dials.
    """
    highest = _first_ephemeral() - 1
    for _ in range(_TRIES):
        port = _chance.randint(_LOWEST, highest)
        if port not in _given and _is_free(port):
            _given.add(port)
            return port
    raise AssertionError(f"no free port between {_LOWEST} and {highest}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a connection that waits for late packets is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _first_ephemeral() -> int:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return first if first > _LOWEST + 1000 else _HIGHEST
