"""How datasets lie on disk: how the layout of a folder is told, and where the parts of a split are."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any, Generic, Literal, TypeVar

from phreg.data.paths import some
from phreg.errors import DataError

logger = logging.getLogger(__name__)

Split = Literal["train", "val"]

SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
}
"""Folders and files that stand for a split, best first."""

IMAGE_NAMES = "names of images"
"""What is in the lists of splits, for messages."""

Reader = TypeVar("Reader", bound=Callable[..., Any])


@dataclass(frozen=True)
class Layout(Generic[Reader]):
    """How a dataset lies on disk.

    Attributes:
        looks: What its folder looks like, for messages.
        fits: Tells whether a folder is of this layout.
        read: Lists what is in a folder.
    """

    looks: str
    fits: Callable[[Path], bool]
    read: Reader


def find_layout(
    root: str | os.PathLike[str], layout: str, layouts: Mapping[str, Layout[Reader]], *, lacking: str
) -> Layout[Reader]:
    """Finds a layout by its name or, for `auto`, the first that fits a folder.

    Args:
        root: Folder of the dataset.
        layout: Name of a layout, or `auto`.
        layouts: Those there are, in the order they are tried.
        lacking: What is said of a folder that none fits.

    Raises:
        DataError: There is no such folder, no layout of that name, or none fits.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"cannot read {root}: there is no such folder; give the dataset's own folder")
    if layout == "auto":
        name = next((name for name, known in layouts.items() if known.fits(root)), None)
        if name is None:
            inside = sorted(path.name for path in root.iterdir())
            raise DataError(
                f"{root} {lacking}: found {some(inside) or 'nothing'}; expected "
                f"{'; '.join(f'{name}: {known.looks}' for name, known in layouts.items())}"
            )
        _tell(root, name)
        return layouts[name]
    if layout not in layouts:
        raise DataError(f"layout {layout!r} asked of {root}; known are auto, {', '.join(layouts)}")
    return layouts[layout]


@cache
def _tell(root: Path, layout: str) -> None:
    """Says, once, as what a folder is read."""
    logger.info("%s is read in the layout %r", root, layout)


def other_layouts(layouts: Mapping[str, Layout[Any]], shown: str) -> str:
    """Lists the layouts beside one that is shown as a tree, a line each, for `phreg tasks`."""
    lines = [
        fill(f"{name}: {known.looks}", 80, initial_indent="  ", subsequent_indent="    ")
        for name, known in layouts.items()
        if name != shown
    ]
    return "\n".join(["Other layouts are known by their folders:", *lines])


def split_folder(root: Path, split: Split) -> Path | None:
    """Finds the folder of a split; None where there is none."""
    return next((root / name for name in SPLIT_NAMES[split] if (root / name).is_dir()), None)


def split_file(folder: Path, split: Split) -> Path:
    """Finds the file of a split's names.

    Raises:
        DataError: There is none.
    """
    names = [f"{name}.txt" for name in SPLIT_NAMES[split]]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise DataError(
            f"no {split} split of {folder}: expected a folder of that name under images and masks, or a file "
            f"{' or '.join(names)} of one name a line; add one"
        )
    return found
