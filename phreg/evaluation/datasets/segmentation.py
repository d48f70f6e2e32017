"""Images with a mask of class indices each, in one of `LAYOUTS`, told apart by their folders.

Files are listed at once and decoded one by one, but for the first few masks: they are read at once to refuse
those that show no class, or a foreground that would not count.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path

import numpy as np

from phreg.data.paths import FORMATS, some
from phreg.data.sources import Files
from phreg.errors import DataError
from phreg.evaluation.datasets.layouts import (
    IMAGE_NAMES,
    SPLIT_NAMES,
    Layout,
    Split,
    find_layout,
    split_file,
    split_folder,
)
from phreg.evaluation.datasets.masks import Segmentation, read_index_mask
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
    name = next(name for name, other in LAYOUTS.items() if other is known)
    if ignore_index is not None and not own:
        raise DataError(
            f"ignore_index={ignore_index} asked of {root}, layout {name}, which says itself what is not "
            "counted; leave ignore_index out, or set layout=folder where the masks are your own"
        )
    found = replace(known.read(Path(root), split), layout=name)
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
    images, masks = split_folder(root / "images", split), split_folder(root / "masks", split)
    listing = None
    if images is None or masks is None:
        images, masks, listing = root / "images", root / "masks", split_file(root, split)
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
    listing = split_file(root / "ImageSets" / lists, split)

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
    images, masks = split_folder(root / "images", split), split_folder(root / "annotations", split)
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
