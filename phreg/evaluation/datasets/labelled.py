"""Labelled images in the layouts people have them in: with a class each, or with a mask of class indices.

    classification   ROOT/[train|val/]CLASS/*.jpg · ROOT/*.jpg + labels.csv or .json · a Hugging Face dataset
    segmentation     images and index masks in one of `LAYOUTS`, told apart by their folders
    boxes            see `box_datasets`

Whatever lies on disk, a reader gets classes numbered from 0 and `IGNORE` (255) for what is not counted. Files
are listed at once and decoded one by one; what is wrong with one is an error that names it.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from phreg.data.sources import (
    FORMATS,
    SUFFIXES,
    Files,
    ImageSource,
    list_images,
    open_images,
    read_text,
    some,
)
from phreg.errors import DataError
from phreg.evaluation.datasets.layouts import Layout, find_layout
from phreg.evaluation.datasets.pairs import (
    Pairs,
    base_name,
    find_files,
    pair_files,
    read_lines,
    read_names,
    without_suffix,
)
from phreg.evaluation.datasets.vocabulary import shipped
from phreg.evaluation.metrics.scores import IGNORE
from phreg.parsing import parse_json

Split = Literal["train", "val"]

MaskIndex = Annotated[int, Field(ge=0, le=65535)]
"""An index that a mask may hold."""

SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
}
"""Folders and files that stand for a split, best first."""

PART_NAMES = frozenset({"images", "masks"})
"""Folders that stand for a part of a dataset."""


IMAGE_NAMES = "names of images"
"""What is in the lists of splits, for messages."""


# --- Classification -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images with a class each.

    Attributes:
        images: The images.
        labels: Class of each.
        classes: Name of each class.
    """

    images: ImageSource
    labels: Int64[Tensor, " images"]
    classes: tuple[str, ...]


def open_labelled(
    data: str | os.PathLike[str], split: Split | None = None, *, labels: str | os.PathLike[str] | None = None
) -> Labelled | None:
    """Finds out how images and their classes are stored, and lists them.

    One of:

    - a folder of class folders, or of `train` and `val` with class folders inside; classes are numbered in
      the order of their names, as torchvision does;
    - a folder of images with a file of labels, by default `labels.csv` or `labels.json` in it: CSV lines
      `file,class`, or JSON `{"file": class}`, files relative to the folder, classes as names or as numbers;
    - the id of a Hugging Face dataset, or a folder that one was saved to.

    Args:
        data: Folder or dataset id.
        split: Part to list; None means all there is.
        labels: File of labels.

    Returns:
        The images, or None where `data` is not divided into splits and one was asked for.

    Raises:
        DataError: There is nothing there, a folder is no class, or labels and images do not match.
    """
    root = Path(data)
    if labels is None and root.is_dir():
        labels = next(
            (root / name for name in ("labels.csv", "labels.json") if (root / name).is_file()), None
        )
    if labels is not None:
        return None if split else _listed(root, Path(labels))
    if not root.is_dir() or (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _hugging_face(os.fspath(data), split)
    divided = _split_folder(root, "train") is not None and _split_folder(root, "val") is not None
    if split is None:
        return _class_folders(root, PART_NAMES.union(*SPLIT_NAMES.values()))
    found = _split_folder(root, split) if divided else None
    return _class_folders(found, PART_NAMES) if found else None


def _class_folders(root: Path, others: Collection[str]) -> Labelled:
    """Lists images by the folder that they are in; folders named as `others` are no classes."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    mistaken = [path.name for path in folders if path.name.lower() in others]
    if mistaken:
        raise DataError(
            f"classes asked for in {root}, found {', '.join(mistaken)}, which names a part of a dataset; "
            "expected a folder of images for each class, in train/ and val/ or in neither: give the "
            "folder above or below, rename the folder, or list classes in labels.csv, lines of file,class"
        )
    if not folders:
        raise DataError(
            f"no classes in {root}: expected a folder of images for each, found none; arrange the images as "
            "CLASS/IMAGE, or list their classes in labels.csv, lines of file,class"
        )
    if len(folders) < 2:
        raise DataError(
            f"two classes at least asked for in {root}, found one folder, {folders[0].name}; expected a "
            "folder of images for each class, in train/ and val/ or in neither: give the folder above "
            "them"
        )
    paths, labels = [], []
    for number, folder in enumerate(folders):
        inside = list_images(folder)
        if not inside:
            raise DataError(f"no images of class {folder.name!r} in {folder}; add some, or remove the folder")
        paths += inside
        labels += [number] * len(inside)
    missing = [path for path in paths if not os.path.isfile(path)]  # noqa: PTH113 - there may be a million
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} images of {root} are links to what is not there: "
            f"{some(missing)}; restore what they point to, or remove them"
        )
    return Labelled(Files(tuple(paths)), torch.tensor(labels), tuple(folder.name for folder in folders))


def _listed(root: Path, path: Path) -> Labelled:
    """Reads the classes of a flat folder from a file; numbers are kept, names are numbered in their order."""
    try:
        text = read_text(path)
        pairs = (
            list(parse_json(text).items())
            if path.suffix.lower() == ".json"
            else [(row[0].strip(), row[1].strip()) for row in csv.reader(text.split("\n")) if row]
        )
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"cannot read labels from {path}: {error}; write CSV lines of file,class, or JSON "
            '{"file": class}'
        ) from error
    if pairs and not (root / pairs[0][0]).is_file() and Path(pairs[0][0]).suffix.lower() not in SUFFIXES:
        pairs = pairs[1:]  # a heading
    missing = [name for name, _ in pairs if not (root / name).is_file()]
    if missing or not pairs:
        raise DataError(
            f"{path} lists {len(pairs)} images, {len(missing)} of which are not in {root}: {some(missing)}; "
            "write paths relative to that folder"
        )
    given = [str(label) for _, label in pairs]
    if all(re.fullmatch(r"\d+", label) for label in given):
        numbers = [int(label) for label in given]
        classes = tuple(str(number) for number in range(max(numbers) + 1))
    else:
        classes = tuple(sorted(set(given)))
        places = {name: number for number, name in enumerate(classes)}
        numbers = [places[label] for label in given]
    return Labelled(Files(tuple(str(root / name) for name, _ in pairs)), torch.tensor(numbers), classes)


def _hugging_face(name: str, split: Split | None) -> Labelled:
    """Lists a Hugging Face dataset; without a split asked for, its training images."""
    called, images = _hugging_face_split(name, split or "train")
    import datasets

    saved = Path(name).is_dir()
    table: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=called)
    table = table[called] if isinstance(table, datasets.DatasetDict) else table
    columns = [key for key, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if not columns:
        raise DataError(
            f"no classes in dataset {name}: found columns {', '.join(table.features)}, none of ClassLabel; "
            "choose another dataset, or save it as a folder of class folders"
        )
    return Labelled(images, torch.tensor(table[columns[0]]), tuple(table.features[columns[0]].names))


def _hugging_face_split(name: str, split: Split) -> tuple[str, ImageSource]:
    """Opens the split under the first name that it goes by."""
    problems = []
    for called in SPLIT_NAMES[split]:
        try:
            return called, open_images(name, split=called)
        except DataError as error:
            problems.append(error)
    raise problems[0]


def _split_folder(root: Path, split: Split) -> Path | None:
    return next((root / name for name in SPLIT_NAMES[split] if (root / name).is_dir()), None)


# --- Segmentation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segmentation:
    """Images with a mask of class indices each.

    Attributes:
        images: The images.
        masks: Path of each one's mask.
        classes: Name of each class.
        numbering: Class of each index found in a mask, `IGNORE` for those not counted.
        background: The class that stands for everything unnamed; None where there is none.
    """

    images: Files
    masks: tuple[str, ...]
    classes: tuple[str, ...]
    numbering: Mapping[int, int]
    background: int | None = None

    def __len__(self) -> int:
        return len(self.masks)

    def picture(self, number: int) -> UInt8[Tensor, "3 height width"]:
        """Reads an image, RGB from 0 to 255."""
        return torch.from_numpy(np.array(self.images.read(number))).permute(2, 0, 1)

    def mask(self, number: int, size: tuple[int, int] | None = None) -> Int64[Tensor, "height width"]:
        """Reads a mask.

        Args:
            number: Which one.
            size: Height and width of its image, where known; they must agree.

        Raises:
            DataError: It cannot be read, holds colours instead of indices, an index without a class, or has
                another size.
        """
        path = self.masks[number]
        values = read_index_mask(path)
        if size is not None and values.shape != size:
            raise DataError(
                f"mask {path} measures {values.shape[1]}x{values.shape[0]} pixels, its image "
                f"{self.images.name(number)} {size[1]}x{size[0]}; pair them anew, or resize the mask "
                "(nearest neighbour)"
            )
        table = np.full(65536, -1, dtype=np.int64)
        table[list(self.numbering)] = list(self.numbering.values())
        classes = table[values]
        if (classes < 0).any():
            unknown = np.unique(values[classes < 0]).tolist()
            raise DataError(
                f"mask {path} has indices {some([str(index) for index in unknown])} that stand for none of "
                f"the {len(self.classes)} classes; lengthen the class list, or write {IGNORE} where pixels "
                "are not to count"
            )
        return torch.from_numpy(classes)


def class_shares(
    classes: Int64[Tensor, "height width"], grid: tuple[int, int], num_classes: int
) -> Float[Tensor, "rows cols {num_classes}"]:
    """Computes how much of each patch each class covers.

    Args:
        classes: Class of each pixel of a canvas, `IGNORE` where it does not count.
        grid: Patches, (rows, cols).
        num_classes: Number of classes.

    Returns:
        Shares of the patch's pixels; pixels that do not count make their sum fall short of 1.
    """
    rows, cols = grid
    unit = classes.shape[0] // rows, classes.shape[1] // cols
    patches = classes.view(rows, unit[0], cols, unit[1]).transpose(1, 2).flatten(2)
    slots = torch.where(patches == IGNORE, num_classes, patches)
    counts = torch.zeros(rows, cols, num_classes + 1, device=classes.device)
    counts.scatter_add_(2, slots, torch.ones_like(slots, dtype=counts.dtype))
    return counts[..., :-1] / patches.shape[-1]


def read_index_mask(path: str | os.PathLike[str], *, lossy: bool = False) -> np.ndarray:
    """Reads a mask of indices, (height, width): grey or palette images, the palette itself left aside.

    Args:
        path: The mask.
        lossy: Whether JPEG will do, which changes indices; for a mask that is cut at a threshold.

    Raises:
        DataError: It cannot be read, or holds colours or, in JPEG, indices that are not exact.
    """
    try:
        with Image.open(path) as image:
            image.load()
            values = np.asarray(image)
            mode, inexact = image.mode, image.format in ("JPEG", "MPO") and not lossy
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read mask {path}: {error}; remove its image, or save it anew") from error
    if inexact:
        raise DataError(
            f"mask {path} is a JPEG, expected exact indices, which JPEG changes along all edges; write the "
            "masks anew as PNG, from what they were made of"
        )
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise DataError(
            f"mask {path} is a picture of mode {mode}, expected one index a pixel; it was probably drawn "
            "with a palette and saved in colours: save it as a palette or grey PNG of class indices"
        )
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"mask {path} has indices {values.min()} to {values.max()}; use 0 to 65535")
    return values.astype(np.int64)


def open_segmentation(
    root: str | os.PathLike[str], split: Split, *, layout: str = "auto", ignore_index: int | None = None
) -> Segmentation:
    """Lists the images and masks of a split.

    Args:
        root: Folder of the dataset; for VOC the year's folder or the VOCdevkit above it.
        split: `train` or `val`, whatever the dataset calls them.
        layout: One of `LAYOUTS`, or `auto`: known by its folders.
        ignore_index: Index that is not counted in the masks of the layout `folder`; None means 255, which is
            refused where it occurs and a listed class does not: it may stand for that class.

    Raises:
        DataError: The folder is of no known layout, a file is missing, no mask shows a class, or 255 is not
            counted and probably stands for a class.
    """
    known = find_layout(root, layout, LAYOUTS, lacking="is of no known layout")
    own = known is LAYOUTS["folder"]
    if ignore_index is not None and not own:
        name = next(name for name, other in LAYOUTS.items() if other is known)
        raise DataError(
            f"ignore_index={ignore_index} asked of {root}, layout {name}, which says itself what is not "
            "counted; leave ignore_index out, or set layout=folder where the masks are your own"
        )
    found = known.read(Path(root), split)
    if ignore_index is not None:
        numbering = {index: index for index in range(len(found.classes))} | {ignore_index: IGNORE}
        found = replace(found, numbering=numbering)
    expected = found.numbering.keys() - {IGNORE, ignore_index} if own else None
    _check_masks(found, f"{split} split of {root}", expected, stated=ignore_index is not None)
    return found


def _check_masks(found: Segmentation, whose: str, expected: Set[int] | None, *, stated: bool) -> None:
    """Refuses masks in which nothing counts, and those whose 255 probably stands for a class.

    Args:
        found: Images and masks.
        whose: Which split of which folder.
        expected: Indices of which each has to occur, if 255 does; None means any but 0 and 255.
        stated: Whether it was said which index is not counted.
    """
    indices: set[int] = set()
    counts = complete = False
    # Hardly any mask is read twice: the first few show that all is well.
    for path in found.masks:
        indices.update(np.flatnonzero(np.bincount(read_index_mask(path).ravel())).tolist())
        counts = any(found.numbering.get(index) != IGNORE for index in indices)
        complete = expected <= indices if expected else bool(indices - {0, IGNORE})
        if counts and (complete or stated):
            return
    masks = f"{len(found)} masks of the {whose}"
    if not counts:
        raise DataError(
            f"none of the {masks} shows any of its {len(found.classes)} classes: all pixels are marked as "
            f"not to count, from {found.masks[0]} on; take the masks that have labels, or write them anew"
        )
    if IGNORE not in indices:
        return
    if expected is None:
        raise DataError(
            f"the {masks} hold 0 and 255 alone, and 255 marks what has no label, so that there is nothing to "
            f"tell apart, from {found.masks[0]} on; write the indices of classes, or set layout=folder and "
            "list two classes in classes.txt"
        )
    never = sorted(expected - indices)
    names = some([found.classes[index] for index in never])
    raise DataError(
        f"the {masks} never show {names}, which classes.txt lists, but they have 255, which is not counted; "
        f"if 255 stands for a class, as in binary masks, write the index {never[0]} instead; if it is not to "
        "count, set ignore_index=255, or list only classes that occur"
    )


def _paired(root: Path, pairs: Pairs, searched: Path) -> tuple[Files, tuple[str, ...]]:
    return pair_files(root, pairs, "masks", searched, lambda mask: read_index_mask(mask).shape)


def _beside(images: Path, masks: Path) -> Pairs:
    """Pairs the JPEGs of one folder with masks of the same names in another."""
    found = find_files(images, FORMATS["JPEG"]) if images.is_dir() else {}
    return [(path, masks / f"{name}.png") for name, path in found.items()]


def _numbered(count: int, *, zero_is_unlabelled: bool = False) -> dict[int, int]:
    """Numbers classes as the masks do; or from 1 in the masks, where 0 is not counted."""
    if zero_is_unlabelled:
        return {0: IGNORE, IGNORE: IGNORE} | {index + 1: index for index in range(count)}
    return {IGNORE: IGNORE} | {index: index for index in range(count)}


# A folder of one's own: images/, masks/, classes.txt

CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CAMVID_SEQUENCES = ("0001TP_", "0006R0_", "0016E5_", "Seq05VD_")


def _folder_files(root: Path, split: Split) -> tuple[Files, tuple[str, ...]]:
    images, masks = _split_folder(root / "images", split), _split_folder(root / "masks", split)
    listing = None
    if images is None or masks is None:
        images, masks, listing = root / "images", root / "masks", _split_file(root, split)
    found, truths = find_files(images), find_files(masks)
    names = list(found)
    if listing is not None:

        def find(line: str) -> str:
            name = without_suffix(line)
            return name if name in found else base_name(line)

        names = [find(line) for line in read_names(listing, IMAGE_NAMES, lambda line: find(line) in found)]
    pairs = [
        (found.get(name, images / f"{name}.jpg"), truths.get(name, masks / f"{name}.png")) for name in names
    ]
    return _paired(root, pairs, listing or images)


def _split_file(folder: Path, split: Split) -> Path:
    """Finds the file of a split's names."""
    names = [f"{name}.txt" for name in SPLIT_NAMES[split]]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise DataError(
            f"no {split} split of {folder}: expected a folder of that name under images and masks, or a file "
            f"{' or '.join(names)} of one name a line; add one"
        )
    return found


def _read_folder(root: Path, split: Split) -> Segmentation:
    path = root / "classes.txt"
    if not path.is_file():
        raise DataError(f"no class list in {root}: write {path.name}, a class a line, the first of index 0")
    classes = tuple(read_lines(path, "names of classes"))
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice or not 2 <= len(classes) <= IGNORE:
        raise DataError(
            f"2 to {IGNORE} different classes asked for in {path}, found {len(classes)}, "
            f"{len(twice)} of them more than once: {some(twice) or '-'}; write each once, in the order of "
            "their indices"
        )
    return Segmentation(*_folder_files(root, split), classes, _numbered(len(classes)))


def _read_camvid(root: Path, split: Split) -> Segmentation:
    numbering = _numbered(len(CAMVID)) | {len(CAMVID): IGNORE}  # 11 is void
    return Segmentation(*_folder_files(root, split), CAMVID, numbering)


def _is_folder(root: Path) -> bool:
    return (root / "images").is_dir() and (root / "masks").is_dir()


def _is_camvid(root: Path) -> bool:
    if not _is_folder(root) or (root / "classes.txt").is_file():
        return False
    masks = find_files(root / "masks", {".png"}).values()
    return bool(masks) and all(path.name.startswith(CAMVID_SEQUENCES) for path in masks)


# PASCAL VOC

VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


def _voc_root(root: Path) -> Path:
    years = [root, *(root / f"VOC{year}" for year in (2012, 2007)), root / "VOCdevkit" / "VOC2012"]
    return next((year for year in years if (year / "SegmentationClass").is_dir()), root)


def _voc_files(root: Path, split: Split, masks: str, lists: str) -> tuple[Files, tuple[str, ...]]:
    listing = _split_file(root / "ImageSets" / lists, split)

    def image(line: str) -> Path:
        return root / "JPEGImages" / f"{base_name(line)}.jpg"

    images = [image(line) for line in read_names(listing, IMAGE_NAMES, lambda line: image(line).is_file())]
    pairs = [(path, root / masks / f"{without_suffix(path.name)}.png") for path in images]
    return _paired(root, pairs, listing)


def _read_voc(root: Path, split: Split) -> Segmentation:
    root = _voc_root(root)
    files = _voc_files(root, split, "SegmentationClass", "Segmentation")
    return Segmentation(*files, VOC, _numbered(len(VOC)), background=0)


def _read_voc20(root: Path, split: Split) -> Segmentation:
    root = _voc_root(root)
    files = _voc_files(root, split, "SegmentationClass", "Segmentation")
    return Segmentation(*files, VOC[1:], _numbered(len(VOC) - 1, zero_is_unlabelled=True))


# ADE20K, as the scene parsing challenge of 2016 gives it


def _ade_root(root: Path) -> Path:
    inside = root / "ADEChallengeData2016"
    return inside if inside.is_dir() else root


def _is_ade(root: Path) -> bool:
    return (_ade_root(root) / "annotations").is_dir() and (_ade_root(root) / "images").is_dir()


def _read_ade(root: Path, split: Split) -> Segmentation:
    root = _ade_root(root)
    images, masks = _split_folder(root / "images", split), _split_folder(root / "annotations", split)
    if images is None or masks is None:
        raise DataError(
            f"no {split} split of {root}: expected images/{SPLIT_NAMES[split][1]} and "
            f"annotations/{SPLIT_NAMES[split][1]}; unpack the whole dataset"
        )
    path = root / "objectInfo150.txt"
    if not path.is_file():
        raise DataError(f"no class list in {root}: {path.name} is missing, which comes with the dataset")
    lines = read_lines(path, "names of classes")[1:]  # under a heading
    classes = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines)
    files = _paired(root, _beside(images, masks), images)
    return Segmentation(*files, classes, _numbered(len(classes), zero_is_unlabelled=True))


# Cityscapes

CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""The classes that count, by their index in `labelIds` masks, of which there are 34."""


def _read_cityscapes(root: Path, split: Split) -> Segmentation:
    folder = root / "leftImg8bit" / split
    masks = root / "gtFine" / split
    pairs = [
        (path, masks / f"{name.removesuffix('_leftImg8bit')}_gtFine_labelIds.png")
        for name, path in find_files(folder, {".png"}).items()
        if name.endswith("_leftImg8bit")
    ]
    numbering = dict.fromkeys(range(34), IGNORE) | {index: number for number, index in enumerate(CITYSCAPES)}
    return Segmentation(*_paired(root, pairs, folder), tuple(CITYSCAPES.values()), numbering)


# PASCAL Context, as mmsegmentation prepares it: VOC2010 with masks of 59 classes


def _context_root(root: Path) -> Path:
    years = (root, root / "VOC2010", root / "VOCdevkit" / "VOC2010")
    return next((year for year in years if (year / "SegmentationClassContext").is_dir()), root)


def _is_context(root: Path) -> bool:
    """Knows the year's own folder, which has VOC's masks too; of several years together, VOC comes first."""
    found = _context_root(root)
    alone = found == root or not (_voc_root(root) / "SegmentationClass").is_dir()
    return alone and (found / "SegmentationClassContext").is_dir()


def _context_files(root: Path, split: Split) -> tuple[Files, tuple[str, ...]]:
    root = _context_root(root)
    return _voc_files(root, split, "SegmentationClassContext", "SegmentationContext")


def _read_context60(root: Path, split: Split) -> Segmentation:
    classes = tuple(shipped()["pascal-context-60"])
    return Segmentation(*_context_files(root, split), classes, _numbered(len(classes)), background=0)


def _read_context59(root: Path, split: Split) -> Segmentation:
    classes = tuple(shipped()["pascal-context-59"])
    numbering = _numbered(len(classes), zero_is_unlabelled=True)
    return Segmentation(*_context_files(root, split), classes, numbering)


# COCO-Stuff, its pixel maps of 2017, in which objects and stuff are numbered from 0 to 181

COCO_OBJECTS = 80
COCO_GAPS = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})
"""Indices that stand for nothing: COCO dropped these kinds of objects."""
COCO_INDICES = tuple(index for index in range(182) if index not in COCO_GAPS)
"""The 171 that do: 80 of objects, then 91 of stuff."""
COCO_MASKS = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017")


def _coco_masks(root: Path) -> Path | None:
    parts = ("train2017", "val2017")
    return next(
        (root / name for name in COCO_MASKS if any((root / name / part).is_dir() for part in parts)), None
    )


def _coco_files(root: Path, split: Split) -> tuple[Files, tuple[str, ...]]:
    part = f"{split}2017"
    masks = (_coco_masks(root) or root / COCO_MASKS[0]) / part
    images = root / "images" / part if (root / "images").is_dir() else root / part
    return _paired(root, _beside(images, masks), images)


def _read_coco_stuff(root: Path, split: Split) -> Segmentation:
    numbering = {IGNORE: IGNORE} | {index: number for number, index in enumerate(COCO_INDICES)}
    return Segmentation(*_coco_files(root, split), tuple(shipped()["coco-stuff"]), numbering)


def _read_coco_object(root: Path, split: Split) -> Segmentation:
    """Counts objects alone; stuff, and what has no label, is background."""
    numbering = {IGNORE: 0} | {
        index: number + 1 if number < COCO_OBJECTS else 0 for number, index in enumerate(COCO_INDICES)
    }
    return Segmentation(*_coco_files(root, split), tuple(shipped()["coco-object"]), numbering, background=0)


LAYOUTS: Mapping[str, Layout[Callable[[Path, Split], Segmentation]]] = {
    "pascal-context-60": Layout(
        "JPEGImages/, SegmentationClassContext/, ImageSets/SegmentationContext/",
        _is_context,
        _read_context60,
    ),
    "pascal-context-59": Layout("the same without background, on request", lambda _: False, _read_context59),
    "voc21": Layout(
        "JPEGImages/, SegmentationClass/, ImageSets/Segmentation/",
        lambda root: (_voc_root(root) / "SegmentationClass").is_dir(),
        _read_voc,
    ),
    "voc20": Layout("the same without background, on request", lambda _: False, _read_voc20),
    "coco-stuff": Layout(
        "images/val2017/, annotations/val2017/ or stuffthingmaps/val2017/ of pixel maps",
        lambda root: _coco_masks(root) is not None,
        _read_coco_stuff,
    ),
    "coco-object": Layout("the same, stuff as background, on request", lambda _: False, _read_coco_object),
    "ade20k": Layout("images/, annotations/, objectInfo150.txt", _is_ade, _read_ade),
    "cityscapes": Layout(
        "leftImg8bit/, gtFine/",
        lambda root: (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir(),
        _read_cityscapes,
    ),
    "camvid": Layout("images/, masks/ with CamVid's file names, no classes.txt", _is_camvid, _read_camvid),
    "folder": Layout("images/, masks/, classes.txt", _is_folder, _read_folder),
}
"""Layouts in the order in which they are tried."""
