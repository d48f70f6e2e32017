"""Images in a Hugging Face dataset, from the hub or from disk, read by the same decoder as all others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from phreg.data.decode import MAX_MEGAPIXELS, decode
from phreg.errors import DataError


@dataclass(frozen=True)
class HubImages:
    """A column of a Hugging Face dataset, left undecoded: our decoder gets the bytes."""

    dataset: Any
    column: str
    origin: str
    max_megapixels: float = MAX_MEGAPIXELS

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Gives the dataset and the row, as `dataset[row]`."""
        return f"{self.origin}[{index}]"

    def read(self, index: int) -> Image.Image:
        """Decodes the image of a row."""
        cell = self.dataset[index][self.column] or {}
        content = cell.get("bytes")
        if content is None and cell.get("path"):
            content = Path(cell["path"])
        return decode(content or b"", self.name(index), max_megapixels=self.max_megapixels)


def open_dataset(name: str, split: str, column: str | None, *, saved: bool) -> HubImages:
    """Opens a dataset, without decoding any image.

    Args:
        name: Its id, or the folder that it was saved to.
        split: Its split.
        column: Its column of images; None means the first such column.
        saved: Whether it is a folder of `save_to_disk`.

    Raises:
        DataError: It cannot be loaded, or has no such split or column, or no rows.
    """
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        found = "a saved dataset" if saved else "no file or folder, but may be the id of a dataset"
        raise DataError(
            f"cannot read images from {name!r}: it is {found}, and Hugging Face datasets need a library of "
            'their own; pip install "phreg[datasets]", or correct the path'
        ) from error
    try:
        table: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        found = "the dataset" if saved else f"it is no file or folder, and as a dataset (split {split!r}) it"
        raise DataError(
            f"cannot read images from {name!r}: {found} cannot be loaded: {error}; check the path or id, "
            "the network, and the split (--data.split of phreg distill)"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise DataError(
                f"no split {split!r} in {name}: found {', '.join(map(str, table))}; choose by --data.split "
                "of phreg distill"
            )
        table = table[split]

    columns = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not columns or column not in (None, *columns):
        raise DataError(
            f"no images in {f'column {column!r}' if column else 'any column'} of {name}: found columns "
            f"{', '.join(table.features)}, with images: {', '.join(columns) or 'none'}; choose by "
            "--data.image-column of phreg distill"
        )
    if len(table) == 0:
        raise DataError(
            f"no images in {name}: split {split!r} has no rows; choose by --data.split of phreg distill"
        )
    chosen = column or columns[0]
    plain = table.select_columns([chosen]).with_format(None)
    return HubImages(plain.cast_column(chosen, datasets.Image(decode=False)), chosen, name)
