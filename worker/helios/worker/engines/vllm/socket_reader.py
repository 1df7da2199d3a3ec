"""Reading a ZMQ socket in an event loop, without a future and two turns of the loop for each message.

pyzmq's own asyncio sockets make a future for every receive and ask the socket for its events several times; at one
stream, where each token is a message and finds the caches cold, that is a tenth of what the front process does.
Here the socket's descriptor is watched and what is there is read at once.

The descriptor is edge-triggered: it says that something may have changed, and is quiet until everything was read. So
each call reads until the socket has nothing more.
"""

import asyncio
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import zmq
import zmq.asyncio

# What is read before others have a turn: an engine that is ahead must not starve the requests that it serves.
_TURN: Final = 16
# A plain number: the enumeration's `&` is a Python call.
_READABLE: Final = int(zmq.POLLIN)


class SocketReader:
    """Calls back for every message of a socket, in order, while it is open. Open it in the event loop.

    Nothing else may receive from the socket meanwhile. Its owner may close it under the reader, which then is silent.
    """

    def __init__(self, owned: zmq.asyncio.Socket, on_message: Callable[[list[zmq.Frame]], None]) -> None:
        """``on_message`` gets the frames of a message, and must not raise."""
        self._owned = owned
        self._on_message = on_message
        # pyzmq's type of an option's value is that of any option.
        self._socket: Any = zmq.Socket.shadow(owned)
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Begins; messages that are there already come in the next turn of the loop."""
        # A descriptor of our own: the socket's may be closed and given to someone else before the loop forgets it.
        self._descriptor = os.dup(self._socket.getsockopt(zmq.FD))
        loop = asyncio.get_running_loop()
        loop.add_reader(self._descriptor, self._read)
        loop.call_soon(self._read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends; what was not read stays in the socket."""
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def _read(self) -> None:
        socket = self._socket
        for _ in range(_TURN):
            if self._descriptor < 0 or self._owned.closed:
                return
            # Asked before each read: to be told that there is nothing costs an exception.
            if not socket.getsockopt(zmq.EVENTS) & _READABLE:
                return
            frames = [socket.recv(zmq.NOBLOCK, copy=False)]
            while frames[-1].more:
                frames.append(socket.recv(zmq.NOBLOCK, copy=False))
            self._on_message(frames)
        asyncio.get_running_loop().call_soon(self._read)
