"""One decoder for all images: any file becomes 8-bit RGB, upright, on white, or one clear error.

    bytes or path ──identify──► PIL's image ──reduce──► size within bounded memory ──convert──► RGB

What cannot be decoded is never half a picture.
"""

import io
import logging
import mmap
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile

from phreg.config import DataConfig
from phreg.data.paths import FORMATS, printable
from phreg.errors import DataError

logger = logging.getLogger(__name__)

MAX_MEGAPIXELS = DataConfig().max_megapixels
"""Largest image that is read at full size, unless something else is asked for."""

BYTES_PER_PIXEL = 24
"""Memory that reading an image takes at most, for each pixel of the largest that is read at full size: WEBP's
decoder holds 16, and an image that is converted and turned 8 more."""

BAND = 2**18
"""Pixels that are converted to RGB at a time."""

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
    name = name or ("an image" if isinstance(data, bytes) else printable(os.fspath(data)))
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
