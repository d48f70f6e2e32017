"""Video propagation: the objects of the first frame followed through a video, by looking patches up.

No training: a patch of a frame takes over the labels of its nearest patches in the first frame and the last
few, as DINO evaluates features on DAVIS (Caron et al. 2021, arXiv 2104.14294, section 4.2.1).

    first frame, its mask ─┐
    last frames, as found ─┴─► the nearest patches within a radius ──exp(cosine / temperature)─┐
                 ▲                                                                             ▼
                 └────────────────────────────── labels of patches ──bilinear──► masks ──► J and F

Read are folders in the layout of DAVIS 2017: JPEGImages/480p/SEQUENCE/*.jpg, Annotations/480p/SEQUENCE/*.png
of object numbers, and a file of sequence names. Frames follow each other by the numbers in their names. As in
its semi-supervised benchmark, first and last frame of a sequence do not count, and every object counts the
same, whatever its sequence.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from phreg.data.paths import natural_order, some
from phreg.data.sources import Files
from phreg.errors import DataError
from phreg.evaluation.bootstrap import PerPicture, resample
from phreg.evaluation.datasets.masks import read_index_mask
from phreg.evaluation.datasets.pairs import find_files, pair_files, read_lines
from phreg.evaluation.dense import Dense
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.metrics.scores import IGNORE, boundary_accuracy, region_similarity
from phreg.evaluation.protocol import RESAMPLING, ProtocolSettings
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.progress import track

DATA = "videos with masks of objects: a folder in the layout of DAVIS 2017"
TREE = """DAVIS/
  JPEGImages/480p/bear/00000.jpg …   frames of a video
  Annotations/480p/bear/00000.png …  masks of object numbers
  ImageSets/2017/val.txt             names of the videos, one a line"""
METRICS = (
    MetricSpec("j_and_f", about="mean of j and f"),
    MetricSpec("j", about="intersection over union of an object's masks"),
    MetricSpec("f", about="F-measure of an object's outlines"),
)

AT_ONCE = 1024
"""Patches that are looked up at a time."""


class Settings(ProtocolSettings):
    """Label propagation by nearest patches; the defaults are DINO's but for sizes and enlargement."""

    sequences: str = "ImageSets/2017/val.txt"
    """File of the sequences' names, one a line, relative to the data."""
    resolution: str = "480p"
    """Folder of frames and of masks."""
    reading: FeatureConfig = FeatureConfig(size=480, unit=True)
    """Canvas of the frames."""
    frames: PositiveInt = 7
    """Last frames that are looked up, beside the first."""
    radius: PositiveInt = 12
    """Patches by which a neighbour may be away, along each axis."""
    neighbours: PositiveInt = 5
    """Neighbours that vote."""
    temperature: PositiveFloat = 0.1
    """Temperature of their votes."""
    enlarge: Literal["scores", "objects"] = "scores"
    """What is enlarged from the canvas to the frame: scores, bilinearly, or the objects that they say, each
    pixel that of the nearest on the canvas. With objects, the first frame's mask is reduced to patches at
    once, not by way of the canvas."""


PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "dino": {
        "reading": {"size": 480, "floor": 64, "unit": True},
        "frames": 7,
        "radius": 12,
        "neighbours": 5,
        "temperature": 0.1,
        "enlarge": "objects",
        "differs": (
            RESAMPLING,
            "frames are normalised as the model's library does, theirs with 0.228 of red",
        ),
    },
}
"""DINO's, with sources in `phreg/evaluation/README.md`."""


@dataclass(frozen=True)
class Video:
    """The frames of a sequence, with a mask of object numbers each."""

    name: str
    frames: Files
    masks: tuple[str, ...]

    def mask(self, number: int, size: tuple[int, int]) -> Int64[Tensor, "height width"]:
        """Reads the mask of a frame of that height and width: object numbers, 0 for none, `IGNORE` for void.

        Raises:
            DataError: It cannot be read, or has another size than the frame.
        """
        values = read_index_mask(self.masks[number])
        if values.shape != size:
            raise DataError(
                f"mask {self.masks[number]} measures {values.shape[1]}x{values.shape[0]} pixels, its frame "
                f"{size[1]}x{size[0]}; take both of one resolution"
            )
        return torch.from_numpy(values)


def is_stochastic(_data: str, _settings: Settings) -> bool:
    """Nothing is drawn."""
    return False


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:  # noqa: ARG001
    """Follows the objects of every sequence.

    Raises:
        DataError: A file is missing or wrong, a first frame shows no object, or a frame is all void.
    """
    scores: dict[str, tuple[float, float]] = {}
    frames = 0
    videos = open_videos(data, settings.sequences, settings.resolution)
    for video in track("sequences", videos):
        scores |= _follow(reader, video, settings)
        frames += len(video.masks) - 2
    region, boundary = (sum(side) / len(scores) for side in zip(*scores.values(), strict=True))
    detail = {
        "j": {name: score[0] for name, score in scores.items()},
        "f": {name: score[1] for name, score in scores.items()},
    }
    figures = {"j_and_f": (region + boundary) / 2, "j": region, "f": boundary}
    notes = {"sequences": len(videos), "objects": len(scores), "readout": reader.readout(settings.reading)}
    shares = {name: _of_sequences(videos, scores, which) for name, which in MEASURES.items()}
    sampled = resample([video.name for video in videos], shares)
    over = {"frames": frames, "objects": len(scores), "sequences": len(videos)}
    return Metrics(figures, detail, notes, counts=dict.fromkeys(figures, over), **sampled)


MEASURES: Mapping[str, Callable[[tuple[float, float]], float]] = {
    "j_and_f": lambda pair: sum(pair) / 2,
    "j": lambda pair: pair[0],
    "f": lambda pair: pair[1],
}
"""Figures of an object, of its J and F."""


def _of_sequences(
    videos: Sequence[Video],
    scores: Mapping[str, tuple[float, float]],
    which: Callable[[tuple[float, float]], float],
) -> PerPicture:
    """Says what each sequence adds to a mean over objects; frames of one are alike."""
    of = [
        [which(pair) for name, pair in scores.items() if name.rpartition("/")[0] == video.name]
        for video in videos
    ]
    return PerPicture(
        np.array([[sum(objects)] for objects in of]), np.array([[float(len(objects))] for objects in of])
    )


def open_videos(data: str, sequences: str, resolution: str) -> list[Video]:
    """Lists the sequences of a folder in DAVIS's layout.

    Raises:
        DataError: The list of names, a frame's mask, or a whole sequence is missing.
    """
    root = Path(data)
    listing = root / sequences
    if not listing.is_file():
        raise DataError(
            f"no list of sequences in {root}: {sequences} is missing; give --data the folder that holds "
            "JPEGImages, Annotations and ImageSets, or name the list in sequences"
        )
    videos = []
    for name in read_lines(listing, "names of sequences"):
        folder, masks = (root / kind / resolution / name for kind in ("JPEGImages", "Annotations"))
        found = find_files(folder) if folder.is_dir() else {}
        order = sorted(found, key=natural_order)
        frames, paths = [found[frame] for frame in order], [masks / f"{frame}.png" for frame in order]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing or len(frames) < 3:
            raise DataError(
                f"sequence {name} has {len(frames)} frames in {folder}, of which 3 are needed, and "
                f"{len(missing)} have no mask: {some(missing) or 'none'}; unpack the whole dataset, or "
                f"take it off {listing}"
            )
        pairs = list(zip(frames, paths, strict=True))
        videos.append(
            Video(name, *pair_files(root, pairs, "masks", folder, lambda path: read_index_mask(path).shape))
        )
    if not videos:
        raise DataError(f"no sequences in {listing}, which is empty; write a name a line")
    return videos


def propagate(
    context: Float[Tensor, "frames rows cols dim"],
    labels: Float[Tensor, "frames rows cols objects"],
    queries: Float[Tensor, "rows cols dim"],
    settings: Settings,
) -> Float[Tensor, "rows cols objects"]:
    """Gives each patch the mean label of its nearest patches in the context, by exp(cosine / temperature).

    Args:
        context: Features of length 1 of earlier frames.
        labels: What their patches show.
        queries: Features of length 1.
        settings: Radius, neighbours and temperature.
    """
    rows, cols = queries.shape[:2]
    bank, shown = context.flatten(0, 2), labels.flatten(0, 2)
    row = torch.arange(rows, device=queries.device).repeat_interleave(cols)
    col = torch.arange(cols, device=queries.device).repeat(rows)
    found = []
    for part in torch.arange(rows * cols, device=queries.device).split(AT_ONCE):
        far = ((row[part, None] - row).abs() > settings.radius) | (
            (col[part, None] - col).abs() > settings.radius
        )
        cosines = queries.flatten(0, 1)[part] @ bank.T
        cosines = cosines.masked_fill(far.repeat(1, len(context)), -torch.inf)
        near, nearest = cosines.topk(min(settings.neighbours, len(bank)), dim=1)
        weights = (near / settings.temperature).softmax(dim=1)
        found.append((weights.unsqueeze(-1) * shown[nearest]).sum(1))
    return torch.cat(found).unflatten(0, (rows, cols))


@torch.no_grad()
def _follow(reader: FeatureReader, video: Video, settings: Settings) -> dict[str, tuple[float, float]]:
    """Follows the objects of one sequence: J and F of each, means over frames."""
    stream = reader.stream(video.frames, settings.reading, video.name)
    start = next(stream)
    mask = video.mask(0, start.placement.picture_size)
    objects = [number for number in mask.unique().tolist() if number not in (0, IGNORE)]
    if not objects:
        void = ", only 255, which is void: number its objects from 1" if (mask == IGNORE).any() else ""
        raise DataError(
            f"mask {video.masks[0]} shows no object{void}; only those of a first frame are followed: write "
            f"them there, or take {video.name} off the list"
        )
    first = start.grid.to(reader.device), _labels(mask, objects, start, settings).to(reader.device)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.frames)
    scores: list[list[tuple[float, float]]] = []
    for number, dense in enumerate(stream, start=1):
        features, labels = (torch.stack(side) for side in zip(first, *recent, strict=True))
        queries = dense.grid.to(reader.device)
        shown = propagate(features, labels, queries, settings)
        recent.append((queries, shown))
        if number == len(video.masks) - 1:
            break
        predicted = _objects(shown.cpu(), dense, settings)
        truth = dense.placement.cut(video.mask(number, dense.placement.picture_size))
        if (truth == IGNORE).all():
            raise DataError(
                f"mask {video.masks[number]} is void all over, so that nothing can be compared there; draw "
                f"the objects of that frame, or take {video.name} off the list"
            )
        scores.append(
            [
                _score((predicted == place) & (truth != IGNORE), truth == name)
                for place, name in enumerate(objects, start=1)
            ]
        )
    return {
        f"{video.name}/{name}": (
            sum(frame[place][0] for frame in scores) / len(scores),
            sum(frame[place][1] for frame in scores) / len(scores),
        )
        for place, name in enumerate(objects)
    }


def _score(predicted: Bool[Tensor, "rows cols"], truth: Bool[Tensor, "rows cols"]) -> tuple[float, float]:
    return region_similarity(predicted, truth), boundary_accuracy(predicted, truth)


def _labels(
    mask: Tensor, objects: list[int], dense: Dense, settings: Settings
) -> Float[Tensor, "rows cols objects"]:
    """Labels patches by the pixel in their middle: 1 at the place of its object, 0 the background's."""
    places = torch.zeros_like(mask)
    for place, name in enumerate(objects, start=1):
        places[mask == name] = place
    rows, cols = dense.grid.shape[:2]
    if settings.enlarge == "objects":
        return one_hot(_nearest(places, (rows, cols)), len(objects) + 1).float()
    canvas = dense.placement.put(places[None].float(), 0)
    middle = interpolate(canvas[None], (rows, cols), mode="nearest-exact")[0, 0]
    return one_hot(middle.long(), len(objects) + 1).float()


def _objects(
    shown: Float[Tensor, "rows cols objects"], dense: Dense, settings: Settings
) -> Int64[Tensor, "height width"]:
    """Finds the object of each pixel; each object's map is stretched from 0 to 1 first, as DINO does."""
    patches, placement = shown.permute(2, 0, 1), dense.placement
    if settings.enlarge == "scores":
        return _strongest(placement.restore(patches))
    top, left, height, width = placement.inside
    canvas = interpolate(patches[None], placement.canvas, mode="bilinear", align_corners=False)[0]
    objects = _strongest(canvas[..., top : top + height, left : left + width])
    return _nearest(objects, (placement.part[2], placement.part[3]))


def _nearest(
    objects: Int64[Tensor, "height width"], size: tuple[int, int]
) -> Int64[Tensor, "new_height new_width"]:
    """Resamples object numbers as PIL does, which decides ties between two pixels in fp64."""
    image = Image.fromarray(objects.to(torch.uint8).numpy())
    return torch.from_numpy(np.array(image.resize((size[1], size[0]), Image.Resampling.NEAREST))).long()


def _strongest(maps: Float[Tensor, "objects height width"]) -> Int64[Tensor, "height width"]:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp(min=1e-12)).argmax(0)
