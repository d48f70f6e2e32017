"""Pictures with captions, one or several each.

    captions.csv     lines of image,caption; several lines of an image are several captions
    captions.json    COCO's: images (id, file_name) and annotations (image_id, caption); or Karpathy's: images
                     (filename, filepath, split, sentences with raw), of which one split is used

Images are looked for where the file says, from the folder on, and in its `images/`.
"""

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg.data.paths import SUFFIXES, read_text, some
from phreg.data.sources import Files
from phreg.errors import DataError
from phreg.parsing import parse_json

NAMES = ("captions.csv", "captions.json")
"""Files that are looked for in the folder, best first."""

EXPECTED = (
    "lines of image,caption in a CSV, COCO's JSON of images and annotations, or Karpathy's JSON of images "
    "with sentences"
)


@dataclass(frozen=True)
class Captioned:
    """Pictures with captions.

    Attributes:
        images: The pictures, each with one caption at least.
        captions: The captions, those of a picture together.
        owners: Number of the picture that each caption is of.
    """

    images: Files
    captions: tuple[str, ...]
    owners: tuple[int, ...]


def open_captions(
    data: str | os.PathLike[str], captions: str | None = None, split: str = "test"
) -> Captioned:
    """Lists pictures with their captions.

    Args:
        data: Folder of the pictures.
        captions: File of captions; None means the one in the folder.
        split: Split of Karpathy's lists.

    Raises:
        DataError: There is no such folder or file, the file is of no known kind, an image is missing, or
            there are fewer than two pictures.
    """
    root = Path(data)
    if not root.is_dir():
        raise DataError(f"cannot read {root}: there is no such folder; give the folder of the pictures")
    path = Path(captions) if captions else next((root / n for n in NAMES if (root / n).is_file()), None)
    if path is None:
        raise DataError(
            f"captions asked for in {root}, found none of {', '.join(NAMES)}; write {EXPECTED}, or name the "
            "file in captions"
        )
    found: dict[str, list[str]] = {}
    try:
        text = read_text(path)
        pairs = _from_json(parse_json(text), split) if path.suffix.lower() == ".json" else _from_csv(text)
        for name, caption in pairs:
            found.setdefault(name, []).append(caption)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(
            f"cannot read captions from {path} ({type(error).__name__}: {error}); write {EXPECTED}"
        ) from error
    empty = [name for name, texts in found.items() if not all(text.strip() for text in texts)]
    if empty or len(found) < 2:
        raise DataError(
            f"{path} has captions of {len(found)} pictures{_of_split(path, split)}, and blank ones of "
            f"{len(empty)}: {some(empty) or 'none'}; retrieval needs two pictures, and words for each"
        )
    paths = [_find(root, name) for name in found]
    missing = [name for name, place in zip(found, paths, strict=True) if place is None]
    if missing:
        raise DataError(
            f"{path} lists {len(found)} pictures, {len(missing)} of which are neither in {root} nor in its "
            f"images/: {some(missing)}; write paths relative to that folder"
        )
    return Captioned(
        Files(tuple(str(place) for place in paths)),
        tuple(caption for texts in found.values() for caption in texts),
        tuple(number for number, texts in enumerate(found.values()) for _ in texts),
    )


def _of_split(path: Path, split: str) -> str:
    return f" in the split {split!r}" if path.suffix.lower() == ".json" else ""


def _from_csv(text: str) -> list[tuple[str, str]]:
    rows = [(row[0].strip(), row[1].strip()) for row in csv.reader(text.split("\n")) if row]
    is_heading = rows and Path(rows[0][0]).suffix.lower() not in SUFFIXES
    return rows[1:] if is_heading else rows


def _from_json(found: Mapping[str, Any], split: str) -> Iterable[tuple[str, str]]:
    images = found["images"]
    if "annotations" in found:
        names = {image["id"]: image["file_name"] for image in images}
        return [(names[each["image_id"]], each["caption"]) for each in found["annotations"]]
    return [
        (os.path.join(image.get("filepath", ""), image["filename"]), sentence["raw"])  # noqa: PTH118 - names
        for image in images
        if image.get("split", split) == split
        for sentence in image["sentences"]
    ]


def _find(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, root / "images" / name) if path.is_file()), None)
