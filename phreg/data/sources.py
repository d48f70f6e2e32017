"""Images by number, however they are stored, all through one decoder.

A source is an immutable list of images: it opens files anew for each read, so it is safe in any process, and
any image can be read without those before it.

    folder, list of paths, tar shards, dataset ──open_images──► ImageSource.read(index) ──decode──► RGB

Files are here. `tar_shards` and `hub_images` are sources of their own; `decode` reads what all of them hold.
"""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from PIL import Image

from phreg.data.decode import MAX_MEGAPIXELS, decode
from phreg.data.hub_images import HubImages, open_dataset
from phreg.data.paths import ADVICE, is_image, printable, read_text, some, walk
from phreg.data.tar_shards import TAR, TarShards, open_tars
from phreg.errors import DataError

logger = logging.getLogger(__name__)


@runtime_checkable
class ImageSource(Protocol):
    """Images by number. Immutable and picklable; files are opened anew for each read, in any process."""

    def __len__(self) -> int:
        """Counts the images."""
        ...

    def name(self, index: int) -> str:
        """Names an image for messages."""
        ...

    def read(self, index: int) -> Image.Image:
        """Decodes an image (see `decode`).

        Raises:
            DataError: This image cannot be read.
        """
        ...


@dataclass(frozen=True)
class Files:
    """Image files, in the order given.

    Attributes:
        paths: Where they are.
        unturned: Numbers of those that are read as they are stored, whatever EXIF says of their orientation.
        max_megapixels: Largest that is read at full size (see `decode`), as in all sources.
        whole: Whether they are read at full size or not at all, as those that go with masks, depths or boxes.
    """

    paths: tuple[str, ...]
    unturned: frozenset[int] = frozenset()
    max_megapixels: float = MAX_MEGAPIXELS
    whole: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Gives the path."""
        return printable(self.paths[index])

    def read(self, index: int) -> Image.Image:
        """Decodes an image file."""
        return decode(
            Path(self.paths[index]),
            upright=index not in self.unturned,
            max_megapixels=self.max_megapixels,
            whole=self.whole,
        )


@dataclass(frozen=True)
class Subset:
    """Some images of a source, renumbered from 0."""

    source: ImageSource
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Names an image as the whole source does."""
        return self.source.name(self.indices[index])

    def read(self, index: int) -> Image.Image:
        """Decodes an image of the whole source."""
        return self.source.read(self.indices[index])


def open_images(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str = "train",
    column: str | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> ImageSource:
    """Finds out what holds the images, and lists them without decoding any.

    A source is one of:

    - a folder of images, searched through all levels and sorted by path, so that the order never depends on
      the file system; links are followed, each folder is entered once, hidden files are left out;
    - a folder of tar shards, or one made by a Hugging Face dataset's `save_to_disk`;
    - a text file with a path a line, relative to that file, in UTF-8 or UTF-16; blank lines are left out, and
      lines that begin with a # unless there is a file of that name;
    - one image, one `.tar`, or a pattern of either: `shards-{000..010}.tar`, `photos/*.jpg`;
    - several paths of images or of tar shards;
    - the id of a Hugging Face dataset, unless something of that name exists on disk.

    Args:
        source: Where the images are.
        split: Split of a Hugging Face dataset.
        column: Its column of images; unset means the first such column.
        max_megapixels: Largest image that is read at full size: larger ones are read at a reduced size, in
            bounded memory (see `decode`).

    Raises:
        DataError: There is nothing there, no image in it, or more than one kind; listed files are missing;
            an archive cannot be indexed.
    """
    return replace(_find_images(source, split, column), max_megapixels=max_megapixels)


def _find_images(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], split: str, column: str | None
) -> Files | TarShards | HubImages:
    if not isinstance(source, str | os.PathLike):
        return _open_paths([Path(path) for path in source], f"the {len(source)} paths given")
    name = os.fspath(source)
    try:
        found = _open_local(name, split, column)
    except OSError as error:
        raise DataError(f"cannot read images from {name!r}: {error}; check path and rights") from error
    if found is not None:
        return found
    looks_like_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None
    if not looks_like_id or PurePosixPath(name).suffix == ".txt" or is_image(name) or TAR.search(name):
        raise DataError(f"cannot read images from {name!r}: there is no such file or folder; {ADVICE}")
    return open_dataset(name, split, column, saved=False)


def _open_local(name: str, split: str, column: str | None) -> Files | TarShards | HubImages | None:
    path = Path(name)
    if name and path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return open_dataset(name, split, column, saved=True)
        return _open_folder(name)
    if path.is_file():
        return _open_paths([path] if is_image(name) or TAR.search(name) else _read_list(path), name)
    if re.search(r"[*?\[{]", name):
        return _open_paths([Path(match) for match in _expand(name)], f"the pattern {name!r}")
    return None


def _open_folder(folder: str) -> Files | TarShards:
    images: list[str] = []
    tars: list[str] = []
    others: Counter[str] = Counter()
    for path in walk(folder):
        if is_image(path):
            images.append(path)
        elif TAR.search(path):
            tars.append(path)
        else:
            others[PurePosixPath(path).suffix.lower() or "(no suffix)"] += 1
    if images and tars:
        raise DataError(
            f"cannot tell which images of {folder} to read: found {len(images)} image files and {len(tars)} "
            f"tar files ({some(tars)}); keep them apart, or name one kind by a pattern: '{folder}/*.tar'"
        )
    suffixes = " ".join(sorted(others))
    if not images and not tars:
        files = f"{others.total()} file{'' if others.total() == 1 else 's'}"
        found = f"found {files}, none an image: {suffixes}" if others else "it is empty"
        raise DataError(f"no images in {folder}: {found}; {ADVICE}")
    if others:
        logger.info("%s: ignored %d files that are no images: %s", folder, others.total(), suffixes)
    return Files(tuple(images)) if images else open_tars(tars, folder)


def _read_list(path: Path) -> list[Path]:
    try:
        lines = read_text(path).split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"no images in {path}: it is neither image, tar file, nor text in UTF-8 or UTF-16; {ADVICE}"
        ) from error
    return [path.parent / name for line in lines if (name := _listed_file(path.parent, line))]


def _listed_file(folder: Path, line: str) -> str:
    """Reads a line of a list: a path, or nothing; a file may begin with a blank or a #."""
    name = line.strip()
    odd = line != name or line.startswith("#")
    if odd and name and (folder / line).is_file():
        return line
    return "" if name.startswith("#") else name


def _expand(pattern: str) -> list[str]:
    """Spells out `{000..010}` and `{a,b}` as a shell does, then wildcards; what is spelled out must exist."""
    group = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if group is not None:
        first, last, words = group.groups()
        numbers = range(int(first), int(last) + 1) if first else ()
        choices = words.split(",") if words else [f"{number:0{len(first)}}" for number in numbers]
        head, tail = pattern[: group.start()], pattern[group.end() :]
        return [path for choice in choices for path in _expand(head + choice + tail)]
    if not glob.has_magic(pattern) or Path(pattern).is_file():
        return [pattern]
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    return sorted(match for match in matches if Path(match).is_file())


def _open_paths(paths: Sequence[Path], asked: str) -> Files | TarShards:
    names = [os.fspath(path) for path in paths]
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise DataError(
            f"cannot read images from {asked}: {len(missing)} of {len(paths)} files are missing: "
            f"{some(missing)}; correct these paths (those in a text file are relative to it)"
        )
    if not names:
        raise DataError(f"no images in {asked}: it names no file; {ADVICE}")
    tars = [name for name in names if TAR.search(name)]
    if tars and len(tars) < len(names):
        raise DataError(
            f"cannot tell which images of {asked} to read: found {len(tars)} tar files and "
            f"{len(names) - len(tars)} others; name one kind"
        )
    return open_tars(tars, asked) if tars else Files(tuple(names))
