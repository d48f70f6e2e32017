"""Small pictures, whole and broken, and folders and tar files of them."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def plain(colour=(10, 200, 30), size=(6, 4), mode="RGB"):
    return Image.new(mode, size, colour)


def noise(size=(40, 30), seed=0):
    """An image no two pixels of which are likely to agree, so that any shift shows."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(image):
    return np.asarray(image)


def write(path, image):
    """Saves an image in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def leave_copies(file):
    """Leaves what notebooks and Macs leave beside a file."""
    copies = file.parent / ".ipynb_checkpoints"
    copies.mkdir(exist_ok=True)
    (copies / f"{file.stem}-checkpoint{file.suffix}").write_bytes(file.read_bytes())
    (file.parent / f"._{file.name}").write_bytes(b"a resource fork")


@pytest.fixture
def mixed_photos(tmp_path):
    """Six readable images of different sizes and formats, on two levels."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, suffix in enumerate(["png", "bmp", "PNG"]):
        noise((30 + number, 40), number).save(folder / f"{number}.{suffix}")
        noise((40, 30 + number), 10 + number).save(folder / "more" / f"{number}.{suffix}")
    return folder


@pytest.fixture
def half_broken(tmp_path):
    """Six images, of which numbers 1, 2 and 5 cannot be read."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for number in range(6):
        noise(seed=number).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").write_text("not found", encoding="utf-8")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:300])
    return folder


def tar_of(folder, path, names=None):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:  # one header block a file
        for name in names or sorted(os.fspath(p.relative_to(folder)) for p in folder.rglob("*.*")):
            archive.add(folder / name, name)
    return path


def saved_dataset(path, contents, column="picture"):
    import datasets

    cells = [content if content is None else {"bytes": content, "path": None} for content in contents]
    features = datasets.Features({"label": datasets.Value("int64"), column: datasets.Image()})
    table = datasets.Dataset.from_dict({"label": list(range(len(cells))), column: cells}, features=features)
    table.save_to_disk(os.fspath(path))
    return path
