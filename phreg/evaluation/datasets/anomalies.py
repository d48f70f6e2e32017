"""Pictures of parts with and without defects, in the layout of MVTec AD (Bergmann et al. 2019).

    bottle/train/good/000.png                               what is normal
    bottle/test/good/000.png                                more of it, to be tested on
    bottle/test/broken_large/000.png                        a defect
    bottle/ground_truth/broken_large/000_mask.png           its pixels, all but 0

A dataset is one such folder, or a folder of them, a category each. Masks may be left out, for a category as a
whole; then nothing is said of pixels.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from phreg.data.paths import some
from phreg.data.sources import Files
from phreg.errors import DataError
from phreg.evaluation.datasets.masks import read_index_mask
from phreg.evaluation.datasets.pairs import find_files, open_annotated

GOOD = "good"
"""Folder of pictures without a defect."""


@dataclass(frozen=True, eq=False)
class InspectedParts:
    """One category: pictures of what is normal, and pictures to be tested.

    Attributes:
        name: Name of the category.
        train: Normal pictures, in the order of their names.
        test: Pictures to be tested.
        defective: Whether each of those shows a defect.
        masks: Path of each one's mask, None where it shows no defect; empty where the category has no masks.
    """

    name: str
    train: Files
    test: Files
    defective: tuple[bool, ...]
    masks: tuple[Path | None, ...]

    def mask(self, number: int, size: tuple[int, int]) -> Bool[Tensor, "height width"]:
        """Reads which pixels of a test picture belong to a defect.

        Args:
            number: Which one.
            size: Height and width of the picture, which the mask must have.

        Raises:
            DataError: The mask cannot be read, has another size, or marks nothing.
        """
        path = self.masks[number]
        if path is None:
            return torch.zeros(size, dtype=torch.bool)
        found = torch.from_numpy(read_index_mask(path) > 0)
        if found.shape != size:
            raise DataError(
                f"mask {path} measures {found.shape[1]}x{found.shape[0]} pixels, its picture "
                f"{self.test.name(number)} {size[1]}x{size[0]}; take both of one resolution"
            )
        if not found.any():
            raise DataError(
                f"mask {path} marks no pixel of {self.test.name(number)}, which lies among those with a "
                f"defect; move the picture to {GOOD}, or correct the mask"
            )
        return found


def open_anomalies(data: str | os.PathLike[str], categories: Sequence[str] = ()) -> list[InspectedParts]:
    """Lists the categories of a folder.

    Args:
        data: Folder of one category, or of several.
        categories: Names of those to list; none means all.

    Raises:
        DataError: There is no category, or not one of those named; one has no normal pictures, nothing to
            test, or masks for some of its defects alone.
    """
    root = Path(data)
    if not root.is_dir():
        raise DataError(f"cannot read {root}: there is no such folder; give the folder of the categories")
    inside = [root] if _is_category(root) else sorted(filter(_is_category, root.iterdir()))
    names = [folder.resolve().name for folder in inside]
    unknown = [name for name in categories if name not in names]
    if unknown or not inside:
        raise DataError(
            f"{', '.join(unknown) or 'categories'} asked for in {root}, found {some(names) or 'none'}; "
            "expected CATEGORY/train/good, CATEGORY/test/DEFECT and CATEGORY/ground_truth/DEFECT/"
            "NAME_mask.png, or the folder of one category"
        )
    chosen = zip(inside, names, strict=True)
    return [_open(folder, name) for folder, name in chosen if not categories or name in categories]


def _is_category(folder: Path) -> bool:
    return (folder / "train" / GOOD).is_dir() and (folder / "test").is_dir()


def _open(folder: Path, name: str) -> InspectedParts:
    train = list(find_files(folder / "train" / GOOD).values())
    tested: list[tuple[Path, Path | None]] = []
    for kind in sorted(path for path in (folder / "test").iterdir() if path.is_dir()):
        for picture, path in find_files(kind).items():
            truth = None if kind.name == GOOD else folder / "ground_truth" / kind.name / picture
            tested.append((path, truth))
    defective = [truth is not None for _, truth in tested]
    if not train or not any(defective) or all(defective):
        raise DataError(
            f"{folder} has {len(train)} normal pictures in train/{GOOD}, {defective.count(False)} in "
            f"test/{GOOD} and {sum(defective)} with a defect, and some of each are needed; unpack the whole "
            "dataset"
        )
    masks = [None if truth is None else _mask(truth) for _, truth in tested]
    lacking = [
        path for (path, truth), mask in zip(tested, masks, strict=True) if truth is not None and mask is None
    ]
    if 0 < len(lacking) < sum(defective):
        raise DataError(
            f"{folder} has {sum(defective)} test pictures with a defect, {len(lacking)} of which have no "
            f"mask in ground_truth: {some(list(map(os.fspath, lacking)))}; add NAME_mask.png of each, or "
            "remove ground_truth to measure pictures alone"
        )
    paths = [path for path, _ in tested]

    def size_of(number: int) -> tuple[int, ...] | None:
        mask = masks[number]
        return None if mask is None else read_index_mask(mask).shape

    # Normal pictures have no truth that could lie another way, and are read upright.
    bare = Files(tuple(map(os.fspath, paths)), whole=True)
    test = bare if lacking else open_annotated(folder, paths, "masks", size_of)
    normal = Files(tuple(map(os.fspath, train)), whole=True)
    return InspectedParts(name, normal, test, tuple(defective), () if lacking else tuple(masks))


def _mask(named: Path) -> Path | None:
    """Finds the mask of a picture: MVTec calls it as the picture with `_mask`, VisA as the picture."""
    candidates = (named.with_name(f"{named.name}{ending}.png") for ending in ("_mask", ""))
    return next((path for path in candidates if path.is_file()), None)
