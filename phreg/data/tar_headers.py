"""The files in a tar archive, found by their headers alone, fast.

A header has 512 bytes, then comes the content, in whole blocks of 512. So from one header the next is found
without reading what lies between. Python's `tarfile` does the same, and makes a large object of each header:
a million take minutes. Here are the kinds of header that archives of images have. At any other, and at
anything broken, `Unusual` is raised, and `tarfile` is asked, which knows all kinds and all errors.
"""

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512

REGULAR, WITHOUT_CONTENT = (b"0", b"\0", b"7"), (b"1", b"2", b"5")
"""Types of entries: files; links and folders."""

PAX, LONG_NAME = b"x", b"L"
"""Types of headers that say more of the entry after them."""


class Unusual(Exception):
    """A header that is not read here; no error of the user's."""


class TarFile(NamedTuple):
    """A regular file in an archive: its name, and where its content lies, in bytes."""

    name: str
    offset: int
    size: int


def regular_files(path: str) -> Iterator[TarFile]:
    """Lists the regular files of an uncompressed archive, in its order.

    Raises:
        Unusual: A header is of another kind, or broken, or the archive ends early.
        OSError: The archive cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield from _read(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _read(descriptor: int, end: int) -> Iterator[TarFile]:
    position, told = 0, {}
    while header := os.pread(descriptor, BLOCK, position):
        if not any(header):
            return
        _check(header)
        kind, offset = header[156:157], position + BLOCK
        size = _number(header[124:136])
        if kind in (PAX, LONG_NAME):
            told |= _more(kind, os.pread(descriptor, size, offset))
        elif kind in REGULAR:
            size = int(told.get("size", size))
            name = told.get("path") or _name(header)
            if name.endswith("/"):  # how old archives mark folders
                raise Unusual
            yield TarFile(name, offset, size)
            told = {}
        elif kind in WITHOUT_CONTENT:
            size, told = 0, {}
        else:
            raise Unusual
        position = offset + -(-size // BLOCK) * BLOCK
        if offset + size > end:
            raise Unusual
    if not position:
        raise Unusual


def _check(header: bytes) -> None:
    """Compares the sum of a header's bytes with the one it states, where its own eight count as spaces."""
    # adler32's lower half is the sum plus 1, modulo 65521, at the speed of C.
    found = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * 32
    if len(header) < BLOCK or (found - _number(header[148:156])) % 65521:
        raise Unusual


def _number(field: bytes) -> int:
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError as error:  # numbers beyond eight gigabytes are written in another way
        raise Unusual from error


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")  # as tarfile does, so that any name can be opened


def _more(kind: bytes, content: bytes) -> dict[str, str]:
    """Reads what a header says of the next entry; of PAX, its name and size."""
    if kind == LONG_NAME:
        return {"path": _text(content.split(b"\0", 1)[0])}
    told = {}
    while content and content[0]:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise Unusual
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"hdrcharset" or key.startswith(b"GNU.sparse"):
            raise Unusual
        if key in (b"path", b"size"):
            told[key.decode()] = _text(value)
        content = content[int(length) :]
    return told
