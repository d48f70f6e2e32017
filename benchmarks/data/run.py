"""How long do many images take to open and read? Makes them, times listing, first batch, steady reading.

python benchmarks/data/run.py                                       20 000 images, in seconds
python benchmarks/data/run.py --images 1000000 --kinds shards       1000 shards, 3 GB of disk
"""

import argparse
import io
import itertools
import json
import os
import platform
import resource
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from phreg.data.crops import Crops, loader
from phreg.data.sampling import Order
from phreg.data.sources import ImageSource, open_images

KINDS = ("shards", "folder", "list")

DIFFERENT = 64
"""Different pictures; the others have the same bytes."""


def pictures(side: int) -> list[bytes]:
    """Encodes small JPEGs of coarse noise."""
    encoded = []
    for seed in range(DIFFERENT):
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(coarse).resize((side, side)).save(stream, "JPEG", quality=80)
        encoded.append(stream.getvalue())
    return encoded


def make(kind: str, root: Path, count: int, per_shard: int, side: int) -> Path | str:
    """Writes the images; returns what `--images` takes."""
    contents = pictures(side)
    groups = [range(first, min(first + per_shard, count)) for first in range(0, count, per_shard)]
    folder = root / kind
    folder.mkdir()
    listed = []
    for number, group in enumerate(groups):
        if kind == "shards":
            with tarfile.open(folder / f"{number:05}.tar", "w") as shard:
                for index in group:
                    entry = tarfile.TarInfo(f"{index:08}.jpg")
                    entry.size = len(contents[index % DIFFERENT])
                    entry.mtime = 1.5  # a fraction, as webdataset writes it: each entry gets a PAX header
                    shard.addfile(entry, io.BytesIO(contents[index % DIFFERENT]))
        else:
            (folder / f"{number:05}").mkdir()
            for index in group:
                path = folder / f"{number:05}" / f"{index:08}.jpg"
                path.write_bytes(contents[index % DIFFERENT])
                listed.append(path.relative_to(root))
    if kind == "shards":
        return f"{folder}/{{00000..{len(groups) - 1:05}}}.tar"
    if kind == "list":
        (root / "list.txt").write_text("\n".join(map(str, listed)))
        return root / "list.txt"
    return folder


def read(source: ImageSource, size: int, batch: int, batches: int, workers: int) -> dict[str, float]:
    """Times the first batch and those after it."""
    order = Order(len(source), batch)
    began = time.perf_counter()
    reading = loader(Crops(source, size), order, 0, batches, workers=workers)
    next(reading)
    first = time.perf_counter()
    images = sum(len(one.names) for one in reading)
    return {
        "first_batch_seconds": round(first - began, 3),
        "images_per_second": round(images / (time.perf_counter() - first), 1),
    }


def resident() -> float:
    """Peak memory of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(kind: str, options: argparse.Namespace) -> dict[str, float | int | str]:
    """Makes images of one kind, and times them."""
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        began = time.perf_counter()
        asked = make(kind, Path(root), options.images, options.per_shard, options.side)
        made, before = time.perf_counter(), resident()
        source = open_images(asked)
        listed = time.perf_counter()
        result: dict[str, float | int | str] = {
            "kind": kind,
            "images": len(source),
            "making_seconds": round(made - began, 2),
            "listing_seconds": round(listed - made, 2),
            "listing_memory_gb": round(resident() - before, 3),
        }
        return result | read(source, options.size, options.batch_size, options.batches, options.workers)


def parser() -> argparse.ArgumentParser:
    """Lists the options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--images", type=int, default=20_000)
    options.add_argument("--per-shard", type=int, default=1000, help="images a shard, or a folder")
    options.add_argument("--side", type=int, default=64, help="pixels of a picture's sides")
    options.add_argument("--size", type=int, default=224, help="pixels of a crop's sides")
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--batches", type=int, default=100, help="batches read")
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options.add_argument("--folder", help="where the images are made for the while; default: the system's")
    options.add_argument("--output", type=Path, help="JSON file to write")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints a table, and writes JSON."""
    options = parser().parse_args(arguments)
    results = [measure(kind, options) for kind in options.kinds]
    names = list(dict.fromkeys(itertools.chain(*results)))
    print(" | ".join(names))
    for result in results:
        print(" | ".join(str(result[name]) for name in names))
    if options.output:
        chosen = {name: value for name, value in vars(options).items() if name not in ("output", "folder")}
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        found = {"options": chosen, "machine": machine, "results": results}
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
