"""A tar archive as a stream: regular files one after another, in bounded memory. Pure: it reads from what it is given.

Of the formats what archivers write of plain files: ustar, GNU's long names, and pax headers with a path and a size. All
else that a member can be (links, devices, sparse files, parts of volumes) is refused, and so is what doesn't add up:
nothing here is a guess at what was meant. The standard library's tarfile reads a header of whatever size it claims to
have into memory, follows sparse maps, and goes on behind broken blocks; a property test holds this reader to it: what
is taken here, it reads the same.

Source: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from helios.registry.strict_json import malformed

_BLOCK: Final = 512
_REGULAR: Final = frozenset({b"0", b"\0"})
_DIRECTORY: Final = b"5"
_PAX: Final = b"x"
_PAX_GLOBAL: Final = b"g"
_LONG_NAME: Final = b"L"
_OTHER_NUMBERS: Final = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))
"""Mode, owner, group, time, device."""
_MAX_NAME_BYTES: Final = 16 << 10
"""Of a GNU long name; Linux has paths of 4 KiB."""
_MAX_PAX_BYTES: Final = 1 << 20
"""Of a pax header: times, owners, and now and then attributes."""
_MAX_DIGITS: Final = 20
"""2^63 has 19."""
_SPARSE: Final = "GNU.sparse."


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of an archive; its path is as the archive has it, checked by nobody."""

    path: str
    size_bytes: int


class TarReader:
    """Reads one archive. `members` yields each file; all of its bytes are taken by `content` before the next one."""

    def __init__(self, read: Callable[[int], bytes], what: str) -> None:
        """Takes what reads the stream, up to as many bytes as it is asked for and none at the end only; and the
        archive's name for messages.
        """
        self._read_some = read
        self._what = what
        self._left_bytes = 0
        # Of the member to come.
        self._long_name = ""
        self._pax: dict[str, str] = {}

    def members(self) -> Iterator[Member]:
        """Yields the files, in the archive's order; directories are nothing.

        Raises:
            InvalidRequest: UNSUPPORTED_FORMAT, the archive is broken, or has what is no plain file.
        """
        while (header := self._header()) is not None:
            kind, size_bytes = header[156:157], _number(header[124:136], self._what)
            if self._is_for_next(kind, size_bytes):
                continue
            path = self._pax.get("path") or self._long_name or _ustar_path(header, self._what)
            if "size" in self._pax:
                size_bytes = _decimal(self._pax["size"], self._what)
            # Old archivers had no type for a directory.
            is_directory = kind == _DIRECTORY or (kind == b"\0" and path.endswith("/"))
            if kind == _DIRECTORY:
                size_bytes = 0
            self._require_plain(path, kind, size_bytes, is_directory=is_directory)
            self._long_name, self._pax = "", {}
            if is_directory:
                continue
            self._left_bytes = size_bytes
            yield Member(path, size_bytes)
            assert not self._left_bytes, "a member is read whole before the next one"
            self._exactly(-size_bytes % _BLOCK)
        if self._long_name or self._pax:
            raise self._broken("ends after the header of a file")
        self._check_end()

    def content(self, at_most: int) -> Iterator[bytes]:
        """Yields the bytes of the member that `members` has yielded last, at most so many at a time."""
        while self._left_bytes:
            piece = self._read(min(at_most, self._left_bytes))
            self._left_bytes -= len(piece)
            yield piece

    def _header(self) -> bytes | None:
        """Returns the next header, None at the end of the archive."""
        header = self._exactly(_BLOCK)
        if not any(header):
            if any(self._exactly(_BLOCK)):
                raise self._broken("has a block of zeros between its files")
            return None
        # The checksum's own field counts as blanks.
        found = sum(header[:148]) + sum(header[156:]) + 8 * 0x20
        if found != _number(header[148:156], self._what):
            raise self._broken("has a damaged header")
        # Nobody needs them, but who writes something else there writes no tar.
        for start, end in _OTHER_NUMBERS:
            _number(header[start:end], self._what)
        return header

    def _is_for_next(self, kind: bytes, size_bytes: int) -> bool:
        """Takes what says more of the member to come; returns whether that is what this is."""
        if kind == _PAX:
            self._pax = self._read_pax(size_bytes)
        elif kind == _LONG_NAME:
            self._long_name = _text(self._small(size_bytes, _MAX_NAME_BYTES).partition(b"\0")[0], self._what)
        elif kind == _PAX_GLOBAL:
            # It would change all that follows; archivers write a comment (git's commit), and nothing that matters.
            found = self._read_pax(size_bytes)
            if {"path", "size"} & found.keys() or any(map(_is_sparse, found)):
                raise self._broken("has a global header that changes its files")
        return kind in {_PAX, _LONG_NAME, _PAX_GLOBAL}

    def _require_plain(self, path: str, kind: bytes, size_bytes: int, *, is_directory: bool) -> None:
        if not path or size_bytes < 0:
            raise self._broken("has a member without a name, or less than nothing of it")
        if kind not in {*_REGULAR, _DIRECTORY} or any(map(_is_sparse, self._pax)):
            raise self._broken(f"has a member {path[:100]!r} that is no plain file, but of type {kind!r}")
        if is_directory and size_bytes:
            raise self._broken(f"has a directory {path[:100]!r} with content")

    def _read_pax(self, size_bytes: int) -> dict[str, str]:
        content, values, begin = self._small(size_bytes, _MAX_PAX_BYTES), dict[str, str](), 0
        # By place: to cut each record off would copy all that follow it, and there may be 200,000.
        while begin < len(content):
            digits, blank, _ = content[begin : begin + 21].partition(b" ")
            end = begin + _decimal(digits.decode("ascii", "replace"), self._what) if blank else begin
            record = content[begin + len(digits) + 1 : end]
            key, equals, value = record.partition(b"=")
            if not equals or not value.endswith(b"\n") or end > len(content):
                raise self._broken("has a damaged extended header")
            begin, value = end, value[:-1]
            values[_text(key, self._what)] = (
                _text(value, self._what) if key == b"path" else value.decode("utf-8", "replace")
            )
        return values

    def _small(self, size_bytes: int, limit_bytes: int) -> bytes:
        if not 0 <= size_bytes <= limit_bytes:
            raise self._broken(f"has a header of {size_bytes} bytes")
        content = self._exactly(size_bytes)
        self._exactly(-size_bytes % _BLOCK)
        return content

    def _check_end(self) -> None:
        # Archivers fill the last record with zeros.
        while piece := self._read_some(_MAX_PAX_BYTES):
            if any(piece):
                raise self._broken("goes on behind its end")

    def _exactly(self, count: int) -> bytes:
        parts: list[bytes] = []
        while count:
            parts.append(self._read(count))
            count -= len(parts[-1])
        return b"".join(parts)

    def _read(self, count: int) -> bytes:
        piece = self._read_some(count)
        if not piece:
            raise self._broken("is cut off")
        return piece

    def _broken(self, why: str) -> Exception:
        return malformed(f"{self._what} {why}")


def _ustar_path(header: bytes, what: str) -> str:
    name = header[:100].partition(b"\0")[0]
    # GNU's magic, "ustar  ", has times where POSIX has the beginning of a long path.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name, what)


def _number(field: bytes, what: str) -> int:
    if field[0] in (0x80, 0xFF):
        # GNU's base 256, for what eight octal digits don't hold, and for times before 1970.
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if not digits:
        return 0
    if not all(0x30 <= digit <= 0x37 for digit in digits):
        raise malformed(f"{what} has a header with a number that is none")
    return int(digits, 8)


def _decimal(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < _MAX_DIGITS):
        raise malformed(f"{what} has an extended header with a number that is none")
    return int(text)


def _text(value: bytes, what: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise malformed(f"{what} has a name that is not UTF-8") from error


def _is_sparse(key: str) -> bool:
    return key.startswith(_SPARSE)
