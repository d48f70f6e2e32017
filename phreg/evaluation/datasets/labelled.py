"""Images with a class each, in the layouts people have them in.

    ROOT/[train|val/]CLASS/*.jpg · ROOT/*.jpg + labels.csv or .json · a Hugging Face dataset

A reader gets classes numbered from 0. Files are listed at once and decoded one by one; what is wrong with one
is an error that names it.
"""

import csv
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from phreg.analysis.inspection import LabelledImages
from phreg.backbones.base import Backbone
from phreg.data.crops import MEASURED_AT_ONCE, Crops, as_input
from phreg.data.paths import SUFFIXES, list_images, read_text, some
from phreg.data.sampling import subsample_indices
from phreg.data.sources import Files, ImageSource, open_images
from phreg.errors import DataError
from phreg.evaluation.datasets.layouts import SPLIT_NAMES, Split, split_folder
from phreg.parsing import parse_json

LABELLED = 1000
"""Images with classes that `read_labelled` reads at most, spread evenly over those there are."""

PART_NAMES = frozenset({"images", "masks"})
"""Folders that stand for a part of a dataset."""


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


def open_labelled(data: str | os.PathLike[str], *, labels: str | os.PathLike[str] | None = None) -> Labelled:
    """Finds out how images and their classes are stored, and lists all of them.

    One of:

    - a folder of class folders, or of `train` and `val` with class folders inside; classes are numbered in
      the order of their names, as torchvision does;
    - a folder of images with a file of labels, by default `labels.csv` or `labels.json` in it: CSV lines
      `file,class`, or JSON `{"file": class}`, files relative to the folder, classes as names or as numbers;
    - the id of a Hugging Face dataset, or a folder that one was saved to.

    Args:
        data: Folder or dataset id; of a dataset with splits, the training images are listed.
        labels: File of labels.

    Raises:
        DataError: There is nothing there, a folder is no class, or labels and images do not match.
    """
    root = Path(data)
    listed = _label_file(root) if labels is None else Path(labels)
    if listed is not None:
        return _listed(root, listed)
    if _is_hugging_face(root):
        return _hugging_face(os.fspath(data), "train")
    return _class_folders(root, PART_NAMES.union(*SPLIT_NAMES.values()))


def open_split(
    data: str | os.PathLike[str], split: Split, *, labels: str | os.PathLike[str] | None = None
) -> Labelled | None:
    """Lists one split of what `open_labelled` finds; None where it is not divided into splits.

    Raises:
        DataError: There is nothing there, or a folder is no class.
    """
    root = Path(data)
    if labels is not None or _label_file(root) is not None:
        return None
    if _is_hugging_face(root):
        return _hugging_face(os.fspath(data), split)
    divided = split_folder(root, "train") is not None and split_folder(root, "val") is not None
    found = split_folder(root, split) if divided else None
    return _class_folders(found, PART_NAMES) if found else None


def _label_file(root: Path) -> Path | None:
    return next((root / name for name in ("labels.csv", "labels.json") if (root / name).is_file()), None)


def _is_hugging_face(root: Path) -> bool:
    return not root.is_dir() or (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def read_labelled(backbone: Backbone, data: str, size: int | tuple[int, int]) -> LabelledImages:
    """Reads images with classes as a model takes them: those that `open_labelled` finds.

    An unreadable image is replaced by the next one, with that one's class.

    Raises:
        DataError: There are none, or labels and images do not match.
    """
    found = open_labelled(data)
    if not len(found.images):
        raise DataError(f"labelled images asked for in {data}, found none; give a folder of class folders")
    numbers = subsample_indices(len(found.images), LABELLED)
    crops = Crops(found.images, size, crop="centre")
    batches, classes = [], []
    for start in range(0, len(numbers), MEASURED_AT_ONCE):
        batch = crops.batch([(0, number) for number in numbers[start : start + MEASURED_AT_ONCE]])
        batches.append(as_input(backbone, batch.images))
        classes.append(found.labels[batch.indices])
    return LabelledImages(batches, torch.cat(classes))


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


def _hugging_face(name: str, split: Split) -> Labelled:
    """Lists a split of a Hugging Face dataset."""
    called, images = _hugging_face_split(name, split)
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
