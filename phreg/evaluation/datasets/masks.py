"""Masks of class indices: read from disk, and as the share of each patch that each class covers.

Whatever indices a dataset's masks hold, a reader gets classes numbered from 0 and `IGNORE` (255) for what is
not counted. What is wrong with a mask is an error that names it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from phreg.data.paths import some
from phreg.data.sources import Files
from phreg.errors import DataError
from phreg.evaluation.metrics.scores import IGNORE

MaskIndex = Annotated[int, Field(ge=0, le=65535)]
"""An index that a mask may hold."""


@dataclass(frozen=True)
class Segmentation:
    """Images with a mask of class indices each.

    Attributes:
        images: The images.
        masks: Path of each one's mask.
        classes: Name of each class.
        numbering: Class of each index found in a mask, `IGNORE` for those not counted.
        background: The class that stands for everything unnamed; None where there is none.
        layout: Name of the layout that they were found in.
    """

    images: Files
    masks: tuple[str, ...]
    classes: tuple[str, ...]
    numbering: Mapping[int, int]
    background: int | None = None
    layout: str = ""

    def __len__(self) -> int:
        return len(self.masks)

    def picture(self, number: int) -> UInt8[Tensor, "3 height width"]:
        """Reads an image, RGB from 0 to 255."""
        return torch.from_numpy(np.array(self.images.read(number))).permute(2, 0, 1)

    def pair(self, number: int) -> tuple[UInt8[Tensor, "3 height width"], Int64[Tensor, "height width"]]:
        """Reads an image and its mask.

        Raises:
            DataError: One of them cannot be read, or they do not fit.
        """
        picture = self.picture(number)
        return picture, self.mask(number, (picture.shape[1], picture.shape[2]))

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
