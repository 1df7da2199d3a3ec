"""h2 as this server uses it, and the frame that h2 would not make.

For h2 a GOAWAY, sent or received, ends the connection at once: what is not written yet is dropped, and every frame
after it is an error, those of the same read included. In HTTP/2 (RFC 9113, 6.8) it ends nothing that runs. So a
received one is only an event here, and a drain's is made without h2.
"""

import struct
from typing import Final

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection, H2ConnectionStateMachine
from h2.errors import ErrorCodes
from h2.events import Event
from h2.settings import SettingCodes, Settings

from helios.mesh.http2.limits import Limits

# Bytes in, bytes out: what is sent is made here and needs no second look.
_CONFIG: Final = H2Configuration(
    client_side=False, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
)
# h2 ends the connection of a peer that opens more streams than were settled. Until the peer has seen the settings it
# can't know: then more streams are refused one by one.
_UNSETTLED: Final = (1 << 31) - 1
_GOAWAY: Final = struct.Struct(">HBBBIII")


class _StateMachine(H2ConnectionStateMachine):
    def process_input(self, input_: ConnectionInputs) -> list[Event]:
        return [] if input_ is ConnectionInputs.RECV_GOAWAY else super().process_input(input_)


class _ServerSide(H2Connection):
    def __init__(self) -> None:
        super().__init__(_CONFIG)
        self.state_machine = _StateMachine()

    def clear_outbound_data_buffer(self) -> None:
        """Does nothing: h2 calls this at a GOAWAY, and header compression counts on what is made being sent."""


def server_side(limits: Limits) -> H2Connection:
    """Returns the protocol's state for a connection that was accepted; nothing is sent yet."""
    connection = _ServerSide()
    connection.local_settings = Settings(
        client=False,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: _UNSETTLED,
            SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
            SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
        },
    )
    connection.decoder.max_header_list_size = limits.max_header_bytes
    return connection


def goaway(last_stream_id: int) -> bytes:
    """Returns the frame that says that streams after ``last_stream_id`` are not taken."""
    # Source: RFC 9113, 6.8: length 8, type 7, no flags, stream 0.
    return _GOAWAY.pack(0, 8, 7, 0, 0, last_stream_id, int(ErrorCodes.NO_ERROR))
