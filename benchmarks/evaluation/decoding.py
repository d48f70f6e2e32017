"""Is reading bound by decoding, at the machine's own JPEG rate?

    python benchmarks/evaluation/decoding.py FOLDER [--count 400] [--workers 1 2 4]

FOLDER has pictures, which are resampled to 512 pixels and written as JPEG first. Each row is the median of
three turns through all of them: `decode` reads and decodes each picture and does nothing else, in as many
threads; `reader` is what an evaluation's reader does beside the model: decode, resample to the canvas, batch.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from phreg.data.paths import SUFFIXES
from phreg.data.sources import ImageSource, open_images
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.formats.load import open_model

SIDE = 512


def write_jpegs(folder: Path, to: Path, count: int) -> None:
    """Resamples pictures, again and again where there are too few."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    for number in range(count):
        with Image.open(paths[number % len(paths)]) as picture:
            picture.convert("RGB").resize((SIDE, SIDE)).save(to / f"{number:05}.jpg", quality=90)


def rate(count: int, turn: Callable[[], object]) -> float:
    """Counts pictures a second, in the median of three turns."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        turn()
        seconds.append(time.perf_counter() - started)
    return count / statistics.median(seconds)


def decode_all(source: ImageSource, workers: int) -> None:
    """Decodes everything."""
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(source.read, range(len(source))):
            pass


def read_all(source: ImageSource, workers: int, cache: Path) -> None:
    """Reads everything as an evaluation does, and leaves out the model alone."""
    reader = FeatureReader(open_model("demo")[0], "demo", FeatureCache(cache), workers=workers)
    for _ in reader._read_split(source, FeatureConfig(size=448), "reading", lambda placed: placed):
        pass


def main() -> None:
    """Measures and prints a JSON object a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        write_jpegs(options.folder, Path(temporary), options.count)
        source = open_images(temporary)
        for workers in options.workers:
            row = {
                "workers": workers,
                "decode": round(rate(len(source), lambda workers=workers: decode_all(source, workers)), 1),
                "reader": round(
                    rate(len(source), lambda workers=workers: read_all(source, workers, Path(temporary))), 1
                ),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
