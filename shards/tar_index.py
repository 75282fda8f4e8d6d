"""The members of a tar and their offsets, read from its headers alone, without trusting them.

Tars come from elsewhere. `tarfile` reads an extended header of any claimed length at once, calls itself for every one of a
chain of them, and takes a negative size as a step back. Here each step goes at least one block forward, nothing is allocated
that a header merely claims, and no name is ever opened as a path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from shards.schema import printable

_BLOCK = 512
_LONGEST_HEADER = 1 << 16  # bytes of a long name or of pax records; paths end at 4 KiB
_PLAIN = (b"0", b"7", b"\0")
_WITHOUT_CONTENT = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"5": "a folder",
                    b"6": "a pipe"}  # fmt: skip
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_SPARSE = b"S"


class TarError(ValueError):
    """Raised for a file that is not a complete tar; the message says at which byte."""


class Member(NamedTuple):
    """A member of a tar; `offset` and `size` of its content in bytes."""

    name: str
    offset: int
    size: int
    kind: str = ""
    """What it is other than a plain file, such as "a symbolic link"."""


def members(file: BinaryIO, most: int) -> Iterator[Member]:
    """Yield the members of a POSIX, pax or GNU tar in order.

    Raises TarError, possibly after some members, also for more than `most` headers.
    """
    end = file.seek(0, 2)
    if end == 0:
        raise TarError("it is empty")
    at, extended, headers = 0, _Extended(), 0
    while at < end:
        file.seek(at)
        header = file.read(_BLOCK)
        if not any(header):
            return
        if len(header) < _BLOCK or not _checksum_fits(header):
            raise TarError(f"it is not a tar, or is damaged, at byte {at}")
        kind, name = header[156:157], extended.name or _short_name(header)
        headers += 1
        if headers > most:
            raise TarError(f"it has more than {most:,} headers, far more than its samples need, the next {_called(name, at)}")
        size = 0 if kind in _WITHOUT_CONTENT else _number(header[124:136], name, at)
        if kind in _PLAIN and extended.size is not None:
            size = extended.size
        offset = at + _BLOCK + (_sparse_maps(file, header) if kind == _SPARSE else 0)
        if offset + size > end:
            raise TarError(f"it ends at byte {end}, and {_called(name, at)} claims {size} bytes")
        if kind == _LONG_NAME:
            extended = extended._replace(name=_read_header(file, size, name, at).partition(b"\0")[0])
        elif kind == _PAX:
            extended = _pax(_read_header(file, size, name, at), extended, name, at)
        elif kind not in (_LONG_LINK, _PAX_GLOBAL):
            yield Member(_text(name), offset, size, _kind_of(kind, extended.sparse))
            extended = _Extended()
        at = offset + -(-size // _BLOCK) * _BLOCK


class _Extended(NamedTuple):
    """Properties of a member from the extended headers before its own."""

    name: bytes = b""
    size: int | None = None
    sparse: bool = False


def _kind_of(kind: bytes, is_sparse: bool) -> str:
    if is_sparse or kind == _SPARSE:
        return "a sparse file"
    return "" if kind in _PLAIN else _WITHOUT_CONTENT.get(kind, "of an unknown kind")


def _called(name: bytes, at: int) -> str:
    return f"member {printable(_text(name))!r} at byte {at}"


def _checksum_fits(header: bytes) -> bool:
    """Return whether the checksum is the sum of all bytes, with its own field taken as spaces."""
    field = header[148:156].strip(b" \0")
    return field.isdigit() and not set(field) & set(b"89") and int(field, 8) == sum(header) - sum(header[148:156]) + 8 * 0x20


def _number(field: bytes, name: bytes, at: int) -> int:
    """Return a size given as octal digits or (GNU) as 0x80 and a binary number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if not digits.isdigit() or set(digits) & set(b"89"):
        raise TarError(f"{_called(name, at)} claims a size that is not a number")
    return int(digits, 8)


def _read_header(file: BinaryIO, size: int, name: bytes, at: int) -> bytes:
    if size > _LONGEST_HEADER:
        raise TarError(f"the extended header of {_called(name, at)} claims {size} bytes; at most {_LONGEST_HEADER} are read")
    return file.read(size)


def _sparse_maps(file: BinaryIO, header: bytes) -> int:
    """Return the size of the blocks in which an old GNU sparse file lists its pieces, between header and content."""
    length, more = 0, header[482]
    while more:
        block = file.read(_BLOCK)
        length, more = length + _BLOCK, len(block) == _BLOCK and block[504]
    return length


def _pax(records: bytes, extended: _Extended, name: bytes, at: int) -> _Extended:
    """Return `extended` with the records `length key=value newline`, where the length includes itself."""
    while records.strip(b"\0"):
        length, space, _ = records[:8].partition(b" ")
        end = int(length) if space and length.isdigit() else 0
        if end <= len(length) + 1 or records[end - 1 : end] != b"\n":
            raise TarError(f"the pax header of {_called(name, at)} is malformed")
        record, records = records[len(length) + 1 : end - 1], records[end:]
        key, _, value = record.partition(b"=")
        if key == b"path":
            extended = extended._replace(name=value)
        elif key == b"size" and value.isdigit() and len(value) < 20:
            extended = extended._replace(size=int(value))
        elif key == b"size":
            raise TarError(f"the pax header of {_called(name, at)} claims a size that is not a number")
        elif key.startswith(b"GNU.sparse."):
            extended = extended._replace(sparse=True)
    return extended


def _short_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
