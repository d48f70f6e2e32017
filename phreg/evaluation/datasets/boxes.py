"""Images with the boxes of their objects, in the layouts people have them in.

    voc      Annotations/*.xml, JPEGImages/, ImageSets/Main/trainval.txt
    coco     annotations/instances_*.json, images, and a list of those to use (COCO20k)
    boxes    images, and boxes.json or boxes.csv
    masks    images/ and masks/, a binary mask each

Whatever lies on disk, a reader gets boxes in pixels of the picture: left, top, right, bottom, ends exclusive.
A picture that EXIF says is to be turned is read as its annotation was made, by the width and height that VOC,
COCO and masks give; a list of boxes gives none, so such pictures are refused there.
Annotations are read at once, images one by one; what is wrong with one is an error that names its file.
"""

import csv
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import find_objects, label

from phreg.data.paths import read_text, some
from phreg.errors import DataError
from phreg.evaluation.datasets.boxed_images import Boxed, Choice, Entry, list_boxed
from phreg.evaluation.datasets.layouts import Layout, find_layout
from phreg.evaluation.datasets.masks import read_index_mask
from phreg.evaluation.datasets.pairs import (
    base_name,
    find_files,
    read_names,
    without_suffix,
)
from phreg.parsing import parse_json

COCO_LIST = "coco_20k_filenames.txt"
"""The list of COCO20k, as LOST calls it."""


def open_boxed(root: str | os.PathLike[str], choice: Choice | None = None, *, layout: str = "auto") -> Boxed:
    """Lists images and their boxes.

    Args:
        root: Folder of the dataset; for VOC the year's folder or the VOCdevkit above it.
        choice: Which of them; None means all there are.
        layout: One of `BOX_LAYOUTS`, or `auto`: known by its folders.

    Raises:
        DataError: The folder is of no known layout, a file is missing or wrong, or no image has a box.
    """
    known = find_layout(root, layout, BOX_LAYOUTS, lacking="is of no known layout with boxes")
    return known.read(Path(root), choice or Choice())


def _read_json(path: Path, example: str) -> Any:
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read boxes from {path}: {error}; expected {example}") from error


# --- PASCAL VOC -----------------------------------------------------------------------------------------


def _voc_years(root: Path) -> list[Path]:
    """Finds the folders of years: the one given, or those in it."""
    above = [root, root / "VOCdevkit"]
    years = [root, *(folder / f"VOC{year}" for folder in above for year in (2007, 2012))]
    return [year for year in years if (year / "Annotations").is_dir()]


def _read_voc(root: Path, choice: Choice) -> Boxed:
    years = _voc_years(root)
    if len(years) != 1:
        raise DataError(
            f"{root} holds {len(years)} folders of VOC boxes: {some([str(year) for year in years])}; give "
            "--data the folder of one year, with Annotations/ in it"
        )
    year = years[0]
    listed = choice.names or year / "ImageSets" / "Main" / "trainval.txt"

    def annotation(line: str) -> Path:
        return year / "Annotations" / f"{base_name(line)}.xml"

    names = read_names(listed, "VOC's images to use", lambda line: annotation(line).is_file())
    return list_boxed(year, (_voc_entry(year, base_name(name), hard=choice.hard) for name in names))


def _voc_entry(year: Path, stem: str, *, hard: bool) -> Entry:
    """Reads an image's boxes; VOC counts pixels from 1 and includes the last."""
    path = year / "Annotations" / f"{stem}.xml"
    boxes = []
    try:
        annotation = ElementTree.parse(path).getroot()
        size = _told_size(annotation.findtext("size/height"), annotation.findtext("size/width"))
        for thing in annotation.iter("object"):
            marked = "1" in (thing.findtext("difficult"), thing.findtext("truncated"))
            if marked and not hard:
                continue
            # A direct child: parts of people have boxes of their own further down.
            sides = [float(thing.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append([sides[0] - 1, sides[1] - 1, sides[2], sides[3]])
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(
            f"cannot read boxes from {path}: {error}; expected VOC's XML, an <object> with a <bndbox> of "
            "xmin, ymin, xmax, ymax; unpack the dataset anew"
        ) from error
    return Entry(year / "JPEGImages" / f"{stem}.jpg", boxes, path, size)


def _told_size(height: Any, width: Any) -> tuple[int, int] | None:
    """Takes the height and width that an annotation tells; some tools leave them out, or write 0."""
    sides = int(height or 0), int(width or 0)
    return sides if all(sides) else None


# --- COCO -----------------------------------------------------------------------------------------------


def _coco_annotations(root: Path) -> list[Path]:
    """Finds files of boxes, that of COCO20k alone where it is there."""
    train = root / "annotations" / "instances_train2014.json"
    return [train] if train.is_file() else sorted((root / "annotations").glob("instances_*.json"))


def _read_coco(root: Path, choice: Choice) -> Boxed:
    found = _coco_annotations(root)
    listed = choice.names or root / COCO_LIST
    if len(found) != 1:
        raise DataError(
            f"{root} has {len(found)} files annotations/instances_*.json: "
            f"{some([path.name for path in found])}; keep one, or add instances_train2014.json"
        )
    if not listed.is_file():
        raise DataError(
            f"no list of images to use of {root}: {listed} is missing; COCO20k's ({COCO_LIST}) comes with "
            "LOST; put it there, or set names to a file of image numbers or file names, one a line"
        )
    path = found[0]
    content = _read_json(path, "COCO's instances file")
    try:
        images = {int(image["id"]): image for image in content["images"]}
        by_name = {str(image["file_name"]): number for number, image in images.items()}
        sizes = {
            number: _told_size(image.get("height"), image.get("width")) for number, image in images.items()
        }
        boxes: dict[int, list[list[float]]] = {number: [] for number in images}
        for thing in content["annotations"]:
            if not thing.get("iscrowd"):
                left, top, width, height = thing["bbox"]
                sides = [left, top, left + width, top + height]
                boxes[int(thing["image_id"])].append([float(round(side)) for side in sides])  # as LOST does
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"cannot read boxes from {path}: {error!r}; expected COCO's instances file, with images (id, "
            "file_name) and annotations (image_id, bbox)"
        ) from error
    names = read_names(listed, "COCO's images to use", by_name.__contains__)
    numbers = [by_name[name] if name in by_name else _coco_number(name, listed) for name in names]
    unknown = [str(number) for number in numbers if number not in images]
    if unknown:
        raise DataError(
            f"{listed} lists {len(numbers)} images, {len(unknown)} of which are not in {path}: "
            f"{some(unknown)}; take the annotations that the list was made for (COCO20k: train2014)"
        )
    return list_boxed(
        root,
        (
            Entry(
                _coco_image(root, images[number]["file_name"]),
                [box for box in boxes[number] if box[2] > box[0] and box[3] > box[1]],
                path,
                sizes[number],
            )
            for number in numbers
        ),
    )


def _coco_number(name: str, listed: Path) -> int:
    """Takes `train2014/COCO_train2014_000000000009.jpg`, or 9."""
    number = Path(name).stem.rsplit("_", 1)[-1]
    if not number.isdigit():
        raise DataError(f"{listed} lists {name!r}, which has no image number; write COCO's ids or file names")
    return int(number)


def _coco_image(root: Path, name: str) -> Path:
    year = name.split("_")[1] if name.count("_") > 1 else ""
    folders = [root / year, root / "images" / year, root / "images", root]
    return next((folder / name for folder in folders if (folder / name).is_file()), folders[0] / name)


# --- Folders of one's own: boxes in a file, or masks ---------------------------------------------------

EXAMPLE = '{"file.jpg": [[left, top, right, bottom], …]}, or CSV lines of file,left,top,right,bottom'


def _boxes_file(root: Path) -> Path | None:
    return next((root / name for name in ("boxes.json", "boxes.csv") if (root / name).is_file()), None)


def _read_boxes(root: Path, choice: Choice) -> Boxed:
    path = _boxes_file(root)
    if path is None:
        raise DataError(f"no boxes in {root}: expected boxes.json or boxes.csv, {EXAMPLE}; add one")
    found: dict[str, list[list[float]]] = {}
    try:
        if path.suffix == ".json":
            for name, boxes in _read_json(path, EXAMPLE).items():
                found[name] = [[float(side) for side in box] for box in boxes]
        else:
            rows = [row for row in csv.reader(read_text(path).split("\n")) if row]
            heading = bool(rows) and rows[0][0].strip().lower() in ("file", "image", "name", "filename")
            for row in rows[heading:]:
                found.setdefault(row[0].strip(), []).append([float(side) for side in row[1:]])
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"cannot read boxes from {path}: {error}; expected {EXAMPLE}") from error
    crooked = [name for name, boxes in found.items() if any(len(box) != 4 for box in boxes)]
    if crooked:
        raise DataError(f"{path} has boxes that are not four numbers: {some(crooked)}; expected {EXAMPLE}")
    chosen = _chosen(found, choice, path)
    return list_boxed(root, (Entry(root / name, found[name], path) for name in chosen))


def _read_masks(root: Path, choice: Choice) -> Boxed:
    """Pairs images and masks by their paths inside both folders, suffixes aside."""
    folders = root / "images", root / "masks"
    images, masks = (find_files(folder) for folder in folders)
    unpaired = sorted(str(images[name]) for name in images.keys() - masks.keys())
    if unpaired or not images:
        raise DataError(
            f"{folders[0]} has {len(images)} images, {len(unpaired)} of which have no mask of the same name "
            f"in {folders[1]}: {some(unpaired)}; add masks, or remove the images"
        )
    chosen = _chosen(images, choice, folders[0])
    return list_boxed(
        root, (_mask_entry(images[name], masks[name], components=choice.components) for name in chosen)
    )


def _chosen(found: Mapping[str, Any], choice: Choice, where: Path) -> list[str]:
    """Keeps the images that a list names, with or without their suffixes."""
    if choice.names is None:
        return list(found)
    by_name = {without_suffix(name): name for name in found}

    def find(line: str) -> str | None:
        return line if line in found else by_name.get(without_suffix(line))

    asked = read_names(choice.names, "the images to use", lambda line: find(line) is not None)
    known = [find(name) for name in asked]
    unknown = [name for name, match in zip(asked, known, strict=True) if match is None]
    if unknown:
        raise DataError(
            f"{choice.names} lists {len(asked)} images, {len(unknown)} of which are not in {where}: "
            f"{some(unknown)}; write names relative to that"
        )
    return [name for name in known if name is not None]


def _mask_entry(image: Path, mask: Path, *, components: bool) -> Entry:
    """Draws the box of a mask, or of each of its parts that hang together by edges."""
    values = read_index_mask(mask, lossy=True)  # soft edges are cut at half, and so are JPEG's
    if 1 < values.max() < 128:
        raise DataError(
            f"mask {mask} has values up to {values.max()}, expected 0 and 1, or 0 and 255; a mask of classes "
            "has no objects: draw one binary mask an image"
        )
    inside = values > values.max() / 2
    parts = inside.astype(np.int32)
    if components:
        label(inside, output=parts)
    boxes = [
        [float(side) for side in (cols.start, rows.start, cols.stop, rows.stop)]
        for rows, cols in find_objects(parts)
    ]
    return Entry(image, boxes, mask, (values.shape[0], values.shape[1]))


BOX_LAYOUTS: Mapping[str, Layout[Callable[[Path, Choice], Boxed]]] = {
    "voc": Layout(
        "Annotations/, JPEGImages/, ImageSets/Main/trainval.txt",
        lambda root: bool(_voc_years(root)),
        _read_voc,
    ),
    "coco": Layout(
        f"annotations/instances_train2014.json, train2014/, {COCO_LIST}",
        lambda root: bool(_coco_annotations(root)),
        _read_coco,
    ),
    "boxes": Layout(
        "images, boxes.json or boxes.csv", lambda root: _boxes_file(root) is not None, _read_boxes
    ),
    "masks": Layout(
        "images/, masks/ of 0 and 255",
        lambda root: (root / "images").is_dir() and (root / "masks").is_dir(),
        _read_masks,
    ),
}
"""Layouts in the order in which they are tried."""
