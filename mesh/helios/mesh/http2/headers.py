"""Header blocks: from bytes to headers and back (RFC 7541), without I/O.

What is sent is made without a dynamic table, so a block means the same wherever it stands, and those of every answer
are made once. What is received is hpack's to decode, tables and all. Where the peer was told to do without a dynamic
table as well (`Limits.header_table_bytes` 0), the same bytes always mean the same headers, and those of a request that
was seen before are not decoded again.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

import hpack

from helios.mesh.http2.wire import Header, RequestHead, read_head

# Of the table that peers may count on until they have seen the settings. Source: RFC 7541, 6.5.2 of RFC 9113.
DEFAULT_TABLE_BYTES: Final = 4096
# A dynamic table of size 0, said once at the beginning: the peer may keep none for what is sent here.
NO_TABLE: Final = b"\x20"
_STATUS_200: Final = b"\x88"
_TABLE_SIZE_BITS: Final = 0xE0
_TABLE_SIZE: Final = 0x20
# Endpoint picks are one or two blocks for each Envoy, more where tracing tells them apart.
_KNOWN_BLOCKS: Final = 64
_KNOWN_BLOCK_BYTES: Final = 2048


class HeaderReader:
    """Decodes the blocks of one connection, all of them and in order."""

    def __init__(self, *, max_header_bytes: int) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=max_header_bytes)
        self._known: dict[bytes, RequestHead] = {}

    def bound_table(self, table_bytes: int) -> None:
        """The peer has acknowledged this size of table, and says with its next block that it keeps to it."""
        self._decoder.max_allowed_table_size = table_bytes

    def read(self, block: bytes) -> list[Header]:
        """Returns the headers of a block. Raises hpack.HPACKError when it can't be read or is above the limit."""
        return list(self._decoder.decode(block, raw=True))

    def read_request(self, block: bytes) -> RequestHead:
        """Returns what a request's block says.

        Raises:
            hpack.HPACKError: It can't be read, or is above the limit.
            MalformedError, NotGrpcError, InvalidRequest: See `wire.read_head`.
        """
        if self._decoder.header_table_size:
            return read_head(self.read(block))
        head = self._known.get(block)
        if head is None:
            head = read_head(self.read(block))
            if len(block) <= _KNOWN_BLOCK_BYTES and block[:1] and block[0] & _TABLE_SIZE_BITS != _TABLE_SIZE:
                if len(self._known) >= _KNOWN_BLOCKS:
                    self._known.clear()
                self._known[block] = head
        return head


def encode(headers: Iterable[Header]) -> bytes:
    """Returns a block."""
    return b"".join(map(_literal, headers))


@lru_cache(maxsize=256)
def _literal(header: Header) -> bytes:
    name, value = header
    if name == b":status" and value == b"200":
        return _STATUS_200
    # Without indexing, with a name of its own; no Huffman code, which saves bytes that loopback does not cost.
    return b"\x00" + _string(name) + _string(value)


def _string(text: bytes) -> bytes:
    size = len(text)
    if size < 0x7F:
        return bytes((size,)) + text
    head, rest = bytearray((0x7F,)), size - 0x7F
    while rest >= 0x80:
        head.append(0x80 | rest & 0x7F)
        rest >>= 7
    head.append(rest)
    return bytes(head) + text
