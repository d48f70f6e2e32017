"""Images with a depth each, in the layouts people have them in.

    nyu-folders   SPLIT/SCENE/rgb_N.jpg beside sync_depth_N.png in millimetres: BTS's export, which DINOv2
                  and PH-Reg use; the lists nyu_train.txt and nyu_test.txt are followed if there
    nyu-mat       nyu_depth_v2_labeled.mat and splits.mat, as NYU gives them: 795 and 654 labelled images
    folder        images/train, depths/train, images/val, depths/val: names match, .png or .npy, of any unit

A file tells its own unit where that is usual: a grey PNG of 16 bits is in millimetres, a .npy of floats in
metres. Of all others `unit` must say it.

Whatever lies on disk, a reader gets metres, and 0 where the depth is unknown or is not to count: on NYUv2
that is all outside of the crop of Eigen et al. 2014, and with it the white frame of the Kinect's pictures.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat
from torch import Tensor

from phreg.data.paths import SUFFIXES, some
from phreg.data.sources import ImageSource, Subset
from phreg.errors import DataError
from phreg.evaluation.datasets.layouts import SPLIT_NAMES, Layout, Split, find_layout
from phreg.evaluation.datasets.pairs import Pairs, find_files, pair_files, read_lines

EIGEN_CROP = (slice(45, 471), slice(41, 601))
"""Rows and columns of a 480x640 picture that count on NYUv2 (Eigen et al. 2014, arXiv 1406.2283)."""

NYU_SIZE = (480, 640)
NYU_LISTS: Mapping[Split, tuple[str, ...]] = {
    "train": ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"),
    "val": ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"),
}
NYU_FOLDERS: Mapping[Split, tuple[str, ...]] = {
    "train": ("official_splits/train", "sync", "train"),
    "val": ("official_splits/test", "test", "val"),
}
NYU_MAT = "nyu_depth_v2_labeled.mat"
NYU_MAT_REMARK = (
    "NYUv2's labelled pictures have 795 to train on, not the list of about 24,000 of the raw set that "
    "published depth probes are trained on"
)


@dataclass(frozen=True, eq=False)
class DepthMaps:
    """Images with a depth each.

    Attributes:
        images: The images.
        read: Reads the depths of one in metres, (height, width).
        names: Where each one's depths are, for messages.
        eigen: Whether what lies outside of `EIGEN_CROP` does not count.
        remark: How these differ from what is usually trained on, which results say; None where they do not.
    """

    images: ImageSource
    read: Callable[[int], np.ndarray]
    names: Sequence[str]
    eigen: bool
    remark: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def counted(self) -> tuple[slice, slice]:
        """Rows and columns of a picture outside of which nothing counts."""
        return EIGEN_CROP if self.eigen else (slice(None), slice(None))

    def depth(self, number: int, size: tuple[int, int]) -> Float[Tensor, "height width"]:
        """Reads depths in metres; 0 is unknown, or does not count.

        Args:
            number: Which ones.
            size: Height and width of their image.

        Raises:
            DataError: They cannot be read, or have another size than the image.
        """
        depth = self.read(number).astype(np.float32)
        expected = NYU_SIZE if self.eigen else size
        if not depth.shape == size == expected:
            raise DataError(
                f"depths {self.names[number]} measure {'x'.join(map(str, depth.shape[::-1]))}, their image "
                f"{self.images.name(number)} {size[1]}x{size[0]} pixels, expected "
                f"{expected[1]}x{expected[0]} of both; pair them anew, or arrange them as layout=folder if "
                "this is not NYUv2"
            )
        depth[~np.isfinite(depth) | (depth < 0)] = 0
        if self.eigen:
            inside = np.zeros_like(depth)
            inside[self.counted] = depth[self.counted]
            depth = inside
        return torch.from_numpy(depth)


@dataclass(frozen=True)
class MatImages:
    """The images of NYU's labelled MATLAB file (HDF5)."""

    path: str

    def __len__(self) -> int:
        with _open_mat(self.path) as file:
            return len(file["images"])

    def name(self, index: int) -> str:
        """Gives the file and the image's number in it, from 0."""
        return f"{self.path}[{index}]"

    def read(self, index: int) -> Image.Image:
        """Decodes an image; MATLAB keeps columns before rows."""
        with _open_mat(self.path) as file:
            return Image.fromarray(np.ascontiguousarray(file["images"][index].transpose(2, 1, 0)))

    def stamps(self) -> Iterator[tuple[Any, ...]]:
        """Tells each picture from others, and from changed ones."""
        status = Path(self.path).stat()
        for index in range(len(self)):
            yield os.path.realpath(self.path), status.st_size, status.st_mtime_ns, index


def open_depths(
    root: str | os.PathLike[str], split: Split, *, layout: str = "auto", unit: float | None = None
) -> DepthMaps:
    """Lists the images and depths of a split.

    Args:
        root: Folder of the dataset.
        split: `train` or `val`, whatever the dataset calls them.
        layout: One of `LAYOUTS`, or `auto`: known by what lies in the folder.
        unit: Metres a step, of all files; None means as each file tells (`told_unit`). NYU's .mat is in
            metres always.

    Raises:
        DataError: The folder is of no known layout, a file is missing, or the unit of one is unknown.
    """
    known = find_layout(root, layout, LAYOUTS, lacking="holds depths in no known layout")
    return known.read(Path(root), split, unit)


MILLIMETRES, METRES = 0.001, 1.0


def told_unit(path: str | os.PathLike[str]) -> float | None:
    """Tells from the header of a file in which unit its depths are.

    Returns:
        Metres a step: 0.001 for a grey PNG of 16 bits, 1 for a .npy of floats; None for all others, e.g. 8
        bits, which reach no farther than 0.255 m in millimetres, and TIFF, which is used with any unit.

    Raises:
        DataError: It cannot be read, or holds colours.
    """
    with _opened(path) as file:
        if isinstance(file, np.ndarray):
            return METRES if file.dtype.kind == "f" else None
        # 16 bits are "I;16", or "I" in earlier versions of PIL; PNG has no more.
        return MILLIMETRES if file.format == "PNG" and file.mode.startswith("I") else None


def read_depth_file(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a grey picture of one number a pixel, such as PNG of 16 bits, or a .npy, as the numbers it holds.

    Raises:
        DataError: It cannot be read, or holds anything but one number a pixel.
    """
    with _opened(path) as file:
        return np.asarray(file)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[np.ndarray | Image.Image]:
    """Opens a file of depths, of which no more than the header is read, and refuses colours."""
    try:
        if Path(path).suffix.lower() == ".npy":
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            if values.ndim != 2 or values.dtype.kind not in "uif":
                raise _not_depths(path, f"an array of {values.dtype} of shape {values.shape}")
            yield values
        else:
            with Image.open(path) as image:
                if image.mode not in ("L", "F") and not image.mode.startswith("I"):
                    raise _not_depths(path, f"a picture of mode {image.mode}")
                yield image
    except (OSError, ValueError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read depths {path}: {error}; remove its image, or save them anew") from error


def _not_depths(path: str | os.PathLike[str], found: str) -> DataError:
    return DataError(
        f"depths {path} are {found}, expected a number a pixel; save them as a grey 16-bit PNG or as .npy of "
        "(height, width), not as a coloured map, with or without a palette"
    )


def _of_files(root: Path, pairs: Pairs, searched: Path, unit: float | None, *, eigen: bool) -> DepthMaps:
    images, depths = pair_files(root, pairs, "depths", searched, lambda depth: read_depth_file(depth).shape)
    units = [told_unit(path) if unit is None else unit for path in depths]
    unknown = [path for path, known in zip(depths, units, strict=True) if known is None]
    if unknown:
        raise DataError(
            f"the unit of {len(unknown)} of {len(depths)} depths of {root} is unknown: {some(unknown)}; only "
            "grey 16-bit PNG (millimetres) and .npy of floats (metres) are read without one: set unit to the "
            "metres a step, e.g. 0.001, or save them as one of these"
        )

    def read(number: int) -> np.ndarray:
        return read_depth_file(depths[number]) * units[number]

    return DepthMaps(images, read, depths, eigen)


# A folder of one's own: images/SPLIT, depths/SPLIT


def _read_folder(root: Path, split: Split, unit: float | None) -> DepthMaps:
    images, depths = (
        next((root / kind / name for name in SPLIT_NAMES[split] if (root / kind / name).is_dir()), None)
        for kind in ("images", "depths")
    )
    if images is None or depths is None:
        raise DataError(
            f"no {split} split of {root}: expected images/{split} and depths/{split}; make these folders"
        )
    truths = find_files(depths, {*SUFFIXES, ".npy"})
    pairs = [(path, truths.get(name, depths / f"{name}.png")) for name, path in find_files(images).items()]
    return _of_files(root, pairs, images, unit, eigen=False)


# NYUv2 as BTS exports it


def _nyu_folder(root: Path, split: Split) -> Path | None:
    return next((root / name for name in NYU_FOLDERS[split] if (root / name).is_dir()), None)


def _is_nyu_folders(root: Path) -> bool:
    folder = _nyu_folder(root, "val")
    return folder is not None and bool(_nyu_images(folder))


def _nyu_images(folder: Path) -> list[Path]:
    return [path for path in find_files(folder, {".jpg"}).values() if path.name.startswith("rgb_")]


def _read_nyu_folders(root: Path, split: Split, unit: float | None) -> DepthMaps:
    folder = _nyu_folder(root, split)
    listing = next((root / name for name in NYU_LISTS[split] if (root / name).is_file()), None)
    if listing is not None:  # image, depths and focal length a line, from the split's folder or the root
        lines = [line.split() for line in read_lines(listing, "images and depths")]
        if any(len(line) < 2 for line in lines):
            raise DataError(
                f"{listing} has a line that names no depths beside the image; write image and depths, or "
                "remove the list, and the folder is read whole"
            )
        base = folder if folder and lines and (folder / lines[0][0].lstrip("/")).is_file() else root
        pairs = [(base / line[0].lstrip("/"), base / line[1].lstrip("/")) for line in lines]
    elif folder is not None:
        pairs = [
            (path, path.with_name(path.name.replace("rgb_", "sync_depth_")).with_suffix(".png"))
            for path in _nyu_images(folder)
        ]
    else:
        raise DataError(
            f"no {split} split of {root}: expected a folder {' or '.join(NYU_FOLDERS[split])}, or a list "
            f"{NYU_LISTS[split][0]}; unpack the whole dataset"
        )
    return _of_files(root, pairs, listing or folder or root, unit, eigen=True)


# NYUv2's labelled images


def _open_mat(path: str | os.PathLike[str]) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            f"cannot read {path}: it is a MATLAB 7.3 file, for which h5py is needed, which is not installed; "
            'pip install "phreg[depth]"'
        ) from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; fetch it anew") from error


def _read_nyu_mat(root: Path, split: Split, _unit: float | None) -> DepthMaps:
    path, splits = root / NYU_MAT, root / "splits.mat"
    if not splits.is_file():
        raise DataError(f"no splits of {path}: {splits} is missing; fetch it from where the labels are from")
    key = {"train": "trainNdxs", "val": "testNdxs"}[split]
    numbers = [int(number) - 1 for number in loadmat(splits)[key].ravel()]
    images = Subset(MatImages(os.fspath(path)), numbers)

    def read(number: int) -> np.ndarray:
        with _open_mat(path) as file:
            return file["depths"][numbers[number]].T

    names = [f"{path}[{number}]" for number in numbers]
    return DepthMaps(images, read, names, eigen=True, remark=NYU_MAT_REMARK)


LAYOUTS: Mapping[str, Layout[Callable[[Path, Split, float | None], DepthMaps]]] = {
    "nyu-mat": Layout(f"{NYU_MAT}, splits.mat", lambda root: (root / NYU_MAT).is_file(), _read_nyu_mat),
    "nyu-folders": Layout(
        "official_splits/ or sync/ and test/, with rgb_*.jpg and sync_depth_*.png",
        _is_nyu_folders,
        _read_nyu_folders,
    ),
    "folder": Layout(
        "images/train, depths/train, images/val, depths/val",
        lambda root: (root / "images").is_dir() and (root / "depths").is_dir(),
        _read_folder,
    ),
}
"""Layouts in the order in which they are tried."""
