"""ReadBlobResponse without protobuf: its one field, `bytes data = 1`, is a tag, a length and the bytes.

Protobuf copies each message's bytes once into the message and once out of it, on both sides; that halves what a stream
of 1 MiB messages carries. What is written here is what protobuf writes (a test compares), and any encoding that it
allows is read.
"""

from helios.api.storage.v1 import blob_service_pb2 as pb

_TAG = 0x0A
"""Field 1, length-delimited. Source: https://protobuf.dev/programming-guides/encoding/"""


def encode_piece(data: bytes) -> bytes:
    """A message with these bytes."""
    length = len(data)
    header = bytearray((_TAG,))
    while length > 0x7F:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    header.append(length)
    return b"".join((header, data))


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
