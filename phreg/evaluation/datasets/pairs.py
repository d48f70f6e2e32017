"""Pictures and what was annotated on them: found by name, checked to be there, turned alike.

A picture's name is its path inside its folder without the suffix, and its mask or depths have the same one.
EXIF may say that a picture is to be turned, which masks, depths and boxes never say: the size they were made
for tells whether that was the picture as it is stored, or turned. Where it fits both or neither, nobody but
the user knows, and nothing is guessed. Every reader of annotations opens its pictures by `open_annotated`.

    images/a/f0.5.jpg ──name a/f0.5──┐
    masks/a/f0.5.png ───name a/f0.5──┴─► pair ──EXIF, sizes──► read upright, read as stored, or refused
"""

import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

from phreg.data.decode import exif_orientation
from phreg.data.paths import SUFFIXES, read_text, some, walk
from phreg.data.sources import Files
from phreg.errors import DataError

Pairs = Sequence[tuple[Path, Path]]
"""Files of pictures, each with that of its truth."""


def read_lines(path: Path, what: str) -> list[str]:
    """Reads the lines of a text file that are not blank.

    Args:
        path: The file.
        what: What is listed in it, for messages.

    Raises:
        DataError: It is missing, or no text.
    """
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {what} from {path}: {error}; write one a line, in a text file of UTF-8"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def read_names(path: Path, what: str, exists: Callable[[str], bool]) -> list[str]:
    """Reads a list of images: a name a line, as it is in the list.

    Lists of some datasets have columns after the name: numbers in VOC's, the path of the mask in CamVid's.
    Those are left out, unless there is an image that is called as the whole line. Whatever else follows a
    blank belongs to the name.

    Args:
        path: The file.
        what: What is listed in it, for messages.
        exists: Tells whether there is an image that a list may call so.

    Raises:
        DataError: It is missing, or no text.
    """
    return [_name(line, exists) for line in read_lines(path, what)]


def _name(line: str, exists: Callable[[str], bool]) -> str:
    first, *columns = line.split()
    is_file = without_suffix(first) != first
    if is_file and any("/" in column for column in columns):
        return first
    may_be_columns = is_file or all(re.fullmatch(r"[+-]?\d+", column) for column in columns)
    return first if may_be_columns and not exists(line) else line


def base_name(name: str) -> str:
    """Takes folders and the suffix of an image off a name."""
    return PurePosixPath(without_suffix(name)).name


def without_suffix(name: str) -> str:
    """Takes the suffix of an image off a name; what follows another dot is part of the name (`f0.5`)."""
    stem, suffix = os.path.splitext(name)  # noqa: PTH122 - names, not paths
    return stem if suffix.lower() in SUFFIXES else name


def find_files(folder: Path, suffixes: Collection[str] = SUFFIXES) -> dict[str, Path]:
    """Finds the files at all levels of a folder, by name, in the order of their names.

    Raises:
        DataError: There is no such folder, or two files have one name.
    """
    if not folder.is_dir():
        raise DataError(f"files asked for in {folder}, and there is no such folder; add it, or set layout")
    found: dict[str, Path] = {}
    for path in map(Path, walk(os.fspath(folder))):
        if path.suffix.lower() not in suffixes:
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise DataError(
                f"cannot tell which file of {folder} is {name!r}: found {found[name].name} and {path.name}; "
                "keep one"
            )
        found[name] = path
    return found


def pair_files(
    root: Path, pairs: Pairs, truth: str, searched: Path, size_of: Callable[[Path], tuple[int, ...]]
) -> tuple[Files, tuple[str, ...]]:
    """Checks that pictures and their truth are there, and finds out how each picture is to be turned.

    Args:
        root: Folder of the dataset.
        pairs: The files.
        truth: What the truth is, for messages.
        searched: Where the pictures were looked for, for messages.
        size_of: Reads the height and width of a file of truth.

    Returns:
        The pictures, and the paths of their truth.

    Raises:
        DataError: There are none, a file is missing, or a picture may lie two ways.
    """
    if not pairs:
        raise DataError(
            f"{root} has 0 pairs of image and {truth}: found no images by {searched}; unpack the whole "
            "dataset, or correct --data"
        )
    missing = [os.fspath(path) for pair in pairs for path in pair if not path.is_file()]
    if missing:
        raise DataError(
            f"{root} has {len(pairs)} pairs of image and {truth}, {len(missing)} files of which are missing: "
            f"{some(missing)}; unpack the whole dataset, {truth} too"
        )
    images, truths = ([pair[side] for pair in pairs] for side in (0, 1))
    found = open_annotated(root, images, truth, lambda number: size_of(truths[number]))
    return found, tuple(map(os.fspath, truths))


def open_annotated(
    root: Path, images: Sequence[Path], truth: str, size_of: Callable[[int], tuple[int, ...] | None]
) -> Files:
    """Opens pictures so that each lies as the picture that its annotation was made on.

    A picture that EXIF says is to be turned is read as it is stored where that has the annotation's size, and
    turned where turned it has. No size tells which it is of a square picture, or of one upside down.

    Args:
        root: Folder of the dataset, for messages.
        images: The pictures, which are there.
        truth: What was annotated, for messages.
        size_of: Gives the height and width that the annotation of a picture was made for, by its number; None
            where it does not say. Asked only of pictures that EXIF says are to be turned.

    Raises:
        DataError: It is unclear how a picture lies.
    """
    unturned, unclear = [], []
    for number, image in enumerate(images):
        orientation, stored = exif_orientation(image)
        if orientation == 1:
            continue
        turned = stored if orientation < 5 else stored[::-1]  # from 5 on, sides change places
        annotated = size_of(number)
        if stored == turned or annotated not in (stored, turned):
            unclear.append(os.fspath(image))
        elif annotated == stored:
            unturned.append(number)
    if unclear:
        raise DataError(
            f"EXIF says of {len(unclear)} of {len(images)} images of {root} that they are to be turned, and "
            f"their {truth} do not tell by their size whether they were made before or after: "
            f"{some(unclear)}; turn these images as their {truth} are, and save them without an EXIF "
            "orientation"
        )
    return Files(tuple(map(os.fspath, images)), frozenset(unturned), whole=True)
