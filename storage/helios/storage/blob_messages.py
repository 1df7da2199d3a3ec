"""ReadBlobResponse without protobuf: its one field, `bytes data = 1`, is a tag, a length and the bytes.

Protobuf copies each message's bytes once into the message and once out of it, on both sides; that halves what a stream
of 1 MiB messages carries. What is written here is what protobuf writes (a test compares), and any encoding that it
allows is read.
"""

from helios.api.storage.v1 import blob_service_pb2 as pb

_TAG = 0x0A
"""Field 1, length-delimited. Source: https://protobuf.dev/programming-guides/encoding/"""


HEADER_BYTES = 11
"""The longest header: a tag, and ten bytes for a length."""


def encode_piece(buffer: bytearray, length: int) -> bytes:
    """A message with the `length` bytes that the buffer has from HEADER_BYTES on; what is before them is overwritten.

    The header is written in front of the bytes where they lie, so that the message is the only copy.
    """
    header = bytearray((_TAG,))
    rest = length
    while rest > 0x7F:
        header.append(rest & 0x7F | 0x80)
        rest >>= 7
    header.append(rest)
    start = HEADER_BYTES - len(header)
    buffer[start:HEADER_BYTES] = header
    return bytes(memoryview(buffer)[start : HEADER_BYTES + length])


def decode_piece(message: bytes) -> memoryview:
    """The bytes of a message, without a copy where the message is written as ours are.

    Raises:
        google.protobuf.message.DecodeError: It is no ReadBlobResponse.
    """
    if message[:1] == bytes((_TAG,)):
        length = shift = 0
        for at in range(1, min(len(message), 11)):
            length |= (message[at] & 0x7F) << shift
            shift += 7
            if message[at] < 0x80:
                if at + 1 + length == len(message):
                    return memoryview(message)[at + 1 :]
                break
    # Unknown fields of a newer Helios, say.
    return memoryview(pb.ReadBlobResponse.FromString(message).data)
