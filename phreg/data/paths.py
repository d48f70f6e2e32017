"""Files by name: which are images, how a folder lists them, lists of paths, and paths in messages."""

import codecs
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}
"""Formats that are read, by PIL's names, and their file suffixes. EPS is not: PIL runs a program for it."""

SUFFIXES = frozenset(itertools.chain.from_iterable(FORMATS.values()))

ADVICE = (
    f"give a folder of images ({' '.join(suffixes[0] for suffixes in FORMATS.values())}), a text file of "
    "paths, .tar shards, or a Hugging Face dataset"
)
"""What to do where there are no images, for messages."""


def is_image(name: str) -> bool:
    """Tells images from other files by their suffix."""
    base = name[name.rfind("/") + 1 :]  # not by PurePosixPath: there may be a million
    dot = base.rfind(".")
    return dot > 0 and base[dot:].lower() in SUFFIXES


def walk(folder: str, entered: set[tuple[int, int]] | None = None) -> Iterator[str]:
    """Lists the files at all levels, sorted by folder; hidden ones are left out, links followed.

    Names are sorted as text, which is the same on any machine. Use `natural_order` where order has a meaning.

    Args:
        folder: Where to begin.
        entered: Folders that were listed already, by device and inode, for links may loop.
    """
    entered = set() if entered is None else entered
    status = Path(folder).stat()
    if (status.st_dev, status.st_ino) in entered:
        return
    entered.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        visible = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    for name, is_folder in visible:
        path = os.path.join(folder, name)  # noqa: PTH118 - a million Paths would fill a gigabyte
        if is_folder:
            yield from walk(path, entered)
        else:
            yield path


def natural_order(name: str) -> tuple[tuple[str | int, ...], str]:
    """A sorting key that compares the numbers in names by value: `f2` before `f10`.

    For names whose order has a meaning, such as the frames of a video. Names that differ in leading zeros
    alone are in the order of their text.
    """
    parts = re.split(r"(\d+)", name)
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """Lists the images at all levels of a folder, as `walk` does."""
    return [path for path in walk(os.fspath(folder)) if is_image(path)]


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, or in UTF-16 where its byte order mark says so; lines end in a line feed.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is in another encoding, or no text.
    """
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    if "\0" in text:  # which is valid, and in no text: UTF-16 without its mark has one beside each letter
        raise UnicodeDecodeError("utf-8", content, 0, len(content), "holds zeros; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def printable(path: str) -> str:
    """Escapes what is no text in a path: file systems allow any bytes, logs and terminals do not."""
    return os.fsencode(path).decode(errors="backslashreplace")


def some(items: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    """Lists the first few of many things, and how many more there are."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*map(printable, items[:limit]), *more])
