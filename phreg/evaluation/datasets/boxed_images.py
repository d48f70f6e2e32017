"""Images with the boxes of their objects, whatever layout they were found in.

Entry of each image (path, boxes, annotation, size) ──list_boxed──► Boxed: images as their boxes lie
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.data.paths import some
from phreg.data.sources import Files
from phreg.errors import DataError
from phreg.evaluation.datasets.pairs import open_annotated


@dataclass(frozen=True, eq=False)
class Boxed:
    """Images with the boxes of their objects.

    Attributes:
        images: Images that have a box.
        boxes: Boxes of each, (objects, 4).
        annotations: The file that each one's boxes come from.
        sizes: Height and width each was annotated at; None where it is not said.
        without: Images left out because they have no box.
    """

    images: Files
    boxes: tuple[Float[Tensor, "_ 4"], ...]
    annotations: tuple[str, ...]
    sizes: tuple[tuple[int, int] | None, ...]
    without: int

    def __len__(self) -> int:
        return len(self.boxes)

    def check(self, number: int, size: tuple[int, int]) -> None:
        """Checks that boxes fit their picture.

        Args:
            number: Which one.
            size: Height and width of the picture.

        Raises:
            DataError: It was annotated at another size, or a box lies outside.
        """
        whose = f"{self.annotations[number]} on {self.images.name(number)}"
        annotated = self.sizes[number]
        if annotated is not None and annotated != size:
            raise DataError(
                f"{whose}: made for {annotated[1]}x{annotated[0]} pixels, the picture has "
                f"{size[1]}x{size[0]}; pair them anew, or resize one"
            )
        boxes = self.boxes[number]
        limits = torch.tensor([size[1], size[0], size[1], size[0]]) + 1  # COCO's are rounded
        if (boxes < -1).any() or (boxes > limits).any() or (boxes[:, 2:] <= boxes[:, :2]).any():
            raise DataError(
                f"{whose}: boxes {boxes.tolist()} are not all within {size[1]}x{size[0]} pixels as left, "
                "top, right, bottom; correct them"
            )


@dataclass(frozen=True)
class Choice:
    """Which images and boxes of a dataset count.

    Attributes:
        names: File of the images to use, a name or number a line; None means the layout's own choice.
        hard: Whether VOC's objects marked difficult or truncated count.
        components: Whether each connected part of a mask has a box of its own.
    """

    names: Path | None = None
    hard: bool = True
    components: bool = False


@dataclass(frozen=True)
class Entry:
    """An image, its boxes, the file they come from, and the height and width that they were made for."""

    image: Path
    boxes: Sequence[Sequence[float]]
    annotation: Path
    size: tuple[int, int] | None = None


def list_boxed(root: Path, entries: Iterable[Entry]) -> Boxed:
    """Opens the images as their boxes lie, and leaves out those without a box, where nothing can be hit.

    Raises:
        DataError: An image is missing, none has a box, or it is unclear how one lies.
    """
    entries = list(entries)
    missing = [os.fspath(entry.image) for entry in entries if not entry.image.is_file()]
    if missing or not entries:
        raise DataError(
            f"{root} has boxes of {len(entries)} images, {len(missing)} of which are missing: "
            f"{some(missing) or 'none is listed'}; unpack the whole dataset, images too"
        )
    boxed = [entry for entry in entries if len(entry.boxes)]
    if not boxed:
        raise DataError(
            f"none of the {len(entries)} images of {root} has a box (first annotation: "
            f"{entries[0].annotation}); check the annotations"
        )
    return Boxed(
        open_annotated(root, [entry.image for entry in boxed], "boxes", lambda number: boxed[number].size),
        tuple(torch.tensor(entry.boxes, dtype=torch.float32) for entry in boxed),
        tuple(os.fspath(entry.annotation) for entry in boxed),
        tuple(entry.size for entry in boxed),
        len(entries) - len(boxed),
    )
