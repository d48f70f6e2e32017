"""Images by number, however they are stored, all through one decoder.

A source is an immutable list of images: it opens files anew for each read, so it is safe in any process, and
any image can be read without those before it. What cannot be decoded is one clear error, never a half
picture.

    folder, list of paths, tar shards, dataset ──open_images──► ImageSource.read(index) ──decode──► RGB

Nothing is streamed: tar shards are indexed once, by their headers.
"""

import codecs
import glob
import io
import itertools
import logging
import mmap
import os
import re
import stat
import struct
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from PIL import ExifTags, Image, ImageFile

from phreg.config import DataConfig
from phreg.errors import DataError

logger = logging.getLogger(__name__)


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
TAR = re.compile(r"\.(tar|tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
MAX_MEGAPIXELS = DataConfig().max_megapixels
"""Largest image that is read at full size, unless something else is asked for."""

BYTES_PER_PIXEL = 24
"""Memory that reading an image takes at most, for each pixel of the largest that is read at full size: WEBP's
decoder holds 16, and an image that is converted and turned 8 more."""

BAND = 2**18
"""Pixels that are converted to RGB at a time."""

ADVICE = (
    f"give a folder of images ({' '.join(suffixes[0] for suffixes in FORMATS.values())}), a text file of "
    "paths, .tar shards, or a Hugging Face dataset"
)


# --- Sources: images by number -------------------------------------------------------------------------


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
        return _printable(self.paths[index])

    def read(self, index: int) -> Image.Image:
        """Decodes an image file."""
        return decode(
            Path(self.paths[index]),
            upright=index not in self.unturned,
            max_megapixels=self.max_megapixels,
            whole=self.whole,
        )


class Member(NamedTuple):
    """Where an image lies in a tar file, in bytes."""

    shard: str
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarShards:
    """Images in uncompressed tar files, read at random by their offsets."""

    members: tuple[Member, ...]
    max_megapixels: float = MAX_MEGAPIXELS

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """Gives the path of the shard, then the name inside it."""
        return _printable(f"{self.members[index].shard}/{self.members[index].name}")

    def read(self, index: int) -> Image.Image:
        """Decodes an image in a shard."""
        member = self.members[index]
        try:
            with Path(member.shard).open("rb") as shard:
                shard.seek(member.offset)
                content = shard.read(member.size)
        except OSError as error:
            raise unreadable(self.name(index), str(error)) from error
        return decode(content, self.name(index), max_megapixels=self.max_megapixels)


@dataclass(frozen=True)
class HubImages:
    """A column of a Hugging Face dataset, left undecoded: our decoder gets the bytes."""

    dataset: Any
    column: str
    origin: str
    max_megapixels: float = MAX_MEGAPIXELS

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Gives the dataset and the row, as `dataset[row]`."""
        return f"{self.origin}[{index}]"

    def read(self, index: int) -> Image.Image:
        """Decodes the image of a row."""
        cell = self.dataset[index][self.column] or {}
        content = cell.get("bytes")
        if content is None and cell.get("path"):
            content = Path(cell["path"])
        return decode(content or b"", self.name(index), max_megapixels=self.max_megapixels)


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
    if not looks_like_id or PurePosixPath(name).suffix == ".txt" or _is_image(name) or TAR.search(name):
        raise DataError(f"cannot read images from {name!r}: there is no such file or folder; {ADVICE}")
    return _open_dataset(name, split, column, saved=False)


def _open_local(name: str, split: str, column: str | None) -> Files | TarShards | HubImages | None:
    path = Path(name)
    if name and path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _open_dataset(name, split, column, saved=True)
        return _open_folder(name)
    if path.is_file():
        return _open_paths([path] if _is_image(name) or TAR.search(name) else _read_list(path), name)
    if re.search(r"[*?\[{]", name):
        return _open_paths([Path(match) for match in _expand(name)], f"the pattern {name!r}")
    return None


def _open_folder(folder: str) -> Files | TarShards:
    images: list[str] = []
    tars: list[str] = []
    others: Counter[str] = Counter()
    for path in walk(folder):
        if _is_image(path):
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
    return Files(tuple(images)) if images else _open_tars(tars, folder)


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
    return [path for path in walk(os.fspath(folder)) if _is_image(path)]


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
    return _open_tars(tars, asked) if tars else Files(tuple(names))


def _open_tars(shards: Sequence[str], asked: str) -> TarShards:
    members = tuple(member for shard in shards for member in _index(shard))
    if not members:
        raise DataError(f"no images in {asked}: found none in {len(shards)} tar files; {ADVICE}")
    return TarShards(members)


def _index(shard: str) -> Iterator[Member]:
    """Lists the images of a tar file by its headers."""
    if not shard.lower().endswith(".tar"):
        raise DataError(
            f"cannot read images from {shard}: it is compressed, so no image can be read without all before "
            "it; decompress it to .tar (images hardly shrink anyway)"
        )
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                hidden = any(part.startswith(".") for part in PurePosixPath(entry.name).parts)
                if entry.isreg() and _is_image(entry.name) and not hidden:
                    yield Member(shard, entry.name, entry.offset_data, entry.size)
            end = archive.offset
        with Path(shard).open("rb") as file:
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a broken header for the end, in silence
                raise tarfile.ReadError(f"broken header at byte {end}")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"cannot index {shard}: {error}; fetch or pack it anew, uncompressed") from error


def _open_dataset(name: str, split: str, column: str | None, *, saved: bool) -> HubImages:
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        found = "a saved dataset" if saved else "no file or folder, but may be the id of a dataset"
        raise DataError(
            f"cannot read images from {name!r}: it is {found}, and Hugging Face datasets need a library of "
            'their own; pip install "phreg[datasets]", or correct the path'
        ) from error
    try:
        table: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        found = "the dataset" if saved else f"it is no file or folder, and as a dataset (split {split!r}) it"
        raise DataError(
            f"cannot read images from {name!r}: {found} cannot be loaded: {error}; check the path or id, "
            "the network, and the split (--data.split of phreg distill)"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise DataError(
                f"no split {split!r} in {name}: found {', '.join(map(str, table))}; choose by --data.split "
                "of phreg distill"
            )
        table = table[split]

    columns = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not columns or column not in (None, *columns):
        raise DataError(
            f"no images in {f'column {column!r}' if column else 'any column'} of {name}: found columns "
            f"{', '.join(table.features)}, with images: {', '.join(columns) or 'none'}; choose by "
            "--data.image-column of phreg distill"
        )
    if len(table) == 0:
        raise DataError(
            f"no images in {name}: split {split!r} has no rows; choose by --data.split of phreg distill"
        )
    chosen = column or columns[0]
    plain = table.select_columns([chosen]).with_format(None)
    return HubImages(plain.cast_column(chosen, datasets.Image(decode=False)), chosen, name)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _printable(path: str) -> str:
    """Escapes what is no text in a path: file systems allow any bytes, logs and terminals do not."""
    return os.fsencode(path).decode(errors="backslashreplace")


def some(items: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    """Lists the first few of many things, and how many more there are."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*map(_printable, items[:limit]), *more])


# --- Decoding ------------------------------------------------------------------------------------------

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""

UNDECODABLE = (
    *(OSError, EOFError, MemoryError, RuntimeError, SyntaxError, ValueError),
    *(LookupError, ArithmeticError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What PIL's decoders raise on hostile bytes. TypeError is left out: it would be our own fault."""


def exif_orientation(path: str | os.PathLike[str]) -> tuple[int, tuple[int, int]]:
    """Reads from an image's header how EXIF says that it is to be turned, and its size as it is stored.

    Returns:
        A key of `UPRIGHT`, or 1 where it is upright as it is or cannot be read; height and width.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in decoding, which is also where a broken file is an error
            with Image.open(path, formats=_available_formats()) as image:
                # Not PNG's own, which would decode the whole picture in search of it.
                found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
                return (found if found in UPRIGHT else 1), (image.height, image.width)
    except UNDECODABLE:
        return 1, (0, 0)


def decode(
    data: bytes | Path,
    name: str | None = None,
    *,
    upright: bool = True,
    max_megapixels: float = MAX_MEGAPIXELS,
    whole: bool = False,
) -> Image.Image:
    """Decodes an image to 8-bit RGB, upright, on white.

    The EXIF orientation is applied; transparency is laid on white; CMYK is converted without a colour
    profile; 16-bit values are divided by 257, whatever part of their range they fill (where that is less than
    a quarter, a warning says so once); an animation gives its first frame.

    Args:
        data: Content of an image file, or its path.
        name: What to call it in messages; unset means the path.
        upright: Whether to apply the EXIF orientation.
        max_megapixels: Largest image that is read at full size. A larger one is read at a half, a quarter or
            an eighth of its size, each pixel the mean of a square of its own. JPEG and JPEG 2000 are decoded
            at that size. The other formats are decoded whole first, where that takes no more memory than an
            image of `max_megapixels` may: `BYTES_PER_PIXEL` each. This takes the place of PIL's own limit,
            which is not heeded.
        whole: Whether a reduced size is refused: what belongs to its pixels (a mask, boxes) would no longer
            fit.

    Raises:
        DataError: It is missing, truncated, empty, in no format of `FORMATS`, of a range of values that
            does not say what is white (floats, 32-bit integers), or too large even at an eighth, which is
            checked before decoding.
    """
    name = name or ("an image" if isinstance(data, bytes) else _printable(os.fspath(data)))
    try:
        with io.BytesIO(data) if isinstance(data, bytes) else _open_file(data) as stream:
            return _decode(stream, name, max_megapixels, upright=upright, whole=whole)
    except UNDECODABLE as error:
        raise unreadable(name, str(error) or type(error).__name__) from error


def _open_file(path: Path) -> io.BufferedReader:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
        raise OSError("it is not a regular file")
    return path.open("rb")


def _decode(
    stream: io.BytesIO | io.BufferedReader, name: str, max_megapixels: float, *, upright: bool, whole: bool
) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks on odd files that it reads all the same
        with _identify(stream) as image:
            if 0 in image.size:
                raise ValueError(f"it measures {image.width}x{image.height} pixels")
            large = image.width * image.height > max_megapixels * 1e6
            factor = _reduce(image, name, max_megapixels, whole=whole) if large else 1
            deep = ";16" in str(image.tile)  # loading forgets how many bits there were
            image.load()
            _check_range(image, name, deep=deep)
            orientation = image.getexif().get(ExifTags.Base.Orientation)  # after load: PIL turns TIFFs itself
            rgb = _to_rgb(image, factor)
            return rgb.transpose(UPRIGHT[orientation]) if upright and orientation in UPRIGHT else rgb


def _identify(stream: io.BytesIO | io.BufferedReader) -> ImageFile.ImageFile:
    """Opens an image as `Image.open` does, but for PIL's own limit of pixels, a setting of the process."""
    head = stream.read(16)
    for name in _available_formats():
        factory, accepts = Image.OPEN[name]
        known = accepts is None or accepts(head)
        if known and not isinstance(known, str):  # a text says why not
            stream.seek(0)
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # the header of another format
                return factory(stream, "")
    found = f"no image of a known format, or its header is broken: it begins with {head!r}"
    raise ValueError(found if head else "it is empty")


def _reduce(image: ImageFile.ImageFile, name: str, max_megapixels: float, *, whole: bool) -> int:
    """Has a large image decoded at a half, a quarter or an eighth of its size, if its format can.

    Returns:
        What its sides are yet to be divided by once it is decoded.

    Raises:
        DataError: It is not to be reduced, or reading it takes too much memory even so.
    """
    width, height = image.size
    found = f"it has {width * height / 1e6:.4g} megapixels ({width}x{height})"
    if whole:
        raise unreadable(
            name,
            f"{found}, and {max_megapixels:g} are read at most where a mask, depths or boxes go with them",
            "make both smaller, or cut them into tiles",
        )
    memory = BYTES_PER_PIXEL * max_megapixels * 1e6
    for factor in (2, 4, 8):
        reduced = -(-width // factor) * -(-height // factor)
        # As RGB, of 4 bytes a pixel, an image exists up to three times: decoded, converted, turned upright.
        takes = _decoder_bytes(image) * width * height + 12 * reduced
        if reduced > max_megapixels * 1e6 or takes > memory:
            continue
        if image.format == "JPEG2000":
            cast(Any, image).reduce = factor.bit_length() - 1
            return 1
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (width // factor, height // factor))
            return 1
        return factor
    raise unreadable(
        name,
        f"{found} as {image.format}, and even to read it at an eighth of its size takes more memory than "
        f"{memory / 1e9:.3g} GB, which a limit of {max_megapixels:g} megapixels allows",
        "make it smaller, save it as a JPEG, not a progressive one, or raise --data.max-megapixels of phreg "
        "distill",
    )


def _decoder_bytes(image: ImageFile.ImageFile) -> int:
    """Counts the bytes that the decoder holds for each stored pixel, whatever size is asked for."""
    if image.format == "JPEG2000":
        return 0
    if image.format in ("JPEG", "MPO"):
        return 2 * len(image.getbands()) if "progressive" in image.info else 0
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    if image.format in ("WEBP", "AVIF"):
        return 4 * stored  # the library's own pictures, and a copy between it and PIL
    if {codec for codec, *_ in image.tile} <= {"raw", "zip", "gif"}:  # decoded row by row
        return stored
    return 3 * stored  # a TIFF's strip may be the whole picture, of 16 bits a channel


def unreadable(name: str, reason: str, advice: str = "remove it or save it anew") -> DataError:
    """The error for an image that cannot be used."""
    return DataError(f"cannot read {name}: {reason}; {advice}")


@lru_cache(maxsize=1)
def _available_formats() -> list[str]:
    """Lists the formats that this build of PIL has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_range(image: Image.Image, name: str, *, deep: bool) -> None:
    """Refuses values that do not say what is white, and warns of dark 16-bit ones."""
    if image.mode == "F" or image.mode.startswith("I"):
        ranges = [(values.min(), values.max()) for values in map(np.asarray, _bands(image))]
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        if image.mode == "F" or low < 0 or high > 65535:
            raise ValueError(f"its values, {low} to {high}, do not say what is white")
        _warn_if_dim(name, int(low), int(high))
    elif deep and image.mode in ("RGB", "RGBA"):  # of which PIL keeps the upper 8
        ranges = cast("tuple[tuple[int, int], ...]", image.getextrema())[:3]
        _warn_if_dim(name, 256 * min(low for low, _ in ranges), 256 * max(high for _, high in ranges) + 255)


def _to_rgb(image: Image.Image, factor: int) -> Image.Image:
    """Converts to 8-bit RGB on white, band by band, and averages squares of `factor` pixels a side."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.convert("RGB") if factor == 1 else image.reduce(factor)
    rgb = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    top = 0
    for band in _bands(image, factor):
        part = _band_to_rgb(band).reduce(factor)
        rgb.paste(part, (0, top))
        top += part.height
    return rgb


def _bands(image: Image.Image, factor: int = 1) -> Iterator[Image.Image]:
    """Cuts an image into bands of `BAND` pixels or fewer, the rows of each a multiple of `factor`."""
    rows = max(1, BAND // (image.width * factor)) * factor
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


_dim_told = mmap.mmap(-1, 1)
"""Whether a dark 16-bit picture was warned of; forked readers share this byte, so that a run says it once."""


def _warn_if_dim(name: str, low: int, high: int) -> None:
    """Warns, once, of a 16-bit picture that fills less than a quarter of its range, as 12 and 14 bits do."""
    if 0 < high < 65536 // 4 and not _dim_told[0]:
        _dim_told[0] = 1
        logger.warning(
            "%s holds 16-bit values from %d to %d of 65535, so it is read nearly black, and others may be "
            "too; if they hold 12 or 14 bits, scale them to all 16 and save them anew (this is said once)",
            name,
            low,
            high,
        )
