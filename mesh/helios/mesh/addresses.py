"""Where others reach a server, by where it listens. Pure."""

from collections.abc import Iterable
from typing import Final

_WILDCARDS: Final = ("0.0.0.0:", "[::]:")
_LOOPBACK: Final = ("127.", "[::1]:", "localhost:")


def dialable(addresses: Iterable[str]) -> str:
    """Returns the address, ``host:port``, that other processes reach best; empty: none of these.

    One beyond this machine goes before loopback. A wildcard says nothing, and a unix socket leads nowhere else.
    """
    tcp = [address for address in addresses if not address.startswith("unix:")]
    beyond = [address for address in tcp if not address.startswith(_LOOPBACK)]
    return next((address for address in beyond or tcp if not address.startswith(_WILDCARDS)), "")
