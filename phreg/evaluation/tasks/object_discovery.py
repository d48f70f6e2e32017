"""Object discovery: one box a picture, found without labels by LOST or TokenCut, against the true ones.

An artifact resembles few patches, which is what LOST takes for an object; so this is the task on which
registers show most. What works differs from model to model: the layer, whether queries, keys or values, and
how far similarities are lowered. So every combination is tried on every picture, by one forward, and the
best is the headline, as "Vision Transformers Need Registers" has it (Darcet et al. 2024, arXiv 2309.16588).

    picture ──FeatureReader──► grid of each layer and source ──LOST with each bias, or TokenCut──► box
    box of each combination ──Placement──► pixels ──IoU > 0.5 with any true one──► CorLoc = share of pictures

That best is chosen with the truth at hand: all of the sweep is recorded, and the first combination, which is
fixed, has a figure of its own. Nothing is random but which pictures are drawn, where `count` asks for fewer.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, PositiveInt
from torch import Tensor

from phreg.data.sources import Subset
from phreg.evaluation.artifacts import artifact_places
from phreg.evaluation.bootstrap import PerPicture, resample
from phreg.evaluation.datasets.boxed_images import Boxed, Choice
from phreg.evaluation.datasets.boxes import BOX_LAYOUTS, open_boxed
from phreg.evaluation.datasets.layouts import other_layouts
from phreg.evaluation.dense import Placement
from phreg.evaluation.examples import Example, LabelledBox, Mark, Panel
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.metrics.scores import is_localised
from phreg.evaluation.protocol import ProtocolSettings
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.evaluation.tasks.lost import Discovery, lost
from phreg.evaluation.tasks.tokencut import tokencut
from phreg.seeding import keyed_generator

DATA = "images with boxes or masks of their objects: a folder in one of the layouts"
TREE = f"""objects/
  images/0001.jpg …
  masks/0001.png …  255 on the object, 0 elsewhere

{other_layouts(BOX_LAYOUTS, "masks")}"""
METRICS = (
    MetricSpec("corloc", about="share of images whose box meets a true one (IoU above 0.5), best of a sweep"),
    MetricSpec("corloc_first", about="the same by the first combination of the sweep, which is fixed"),
    MetricSpec(
        "artifact_seeds",
        better="lower",
        about="share of images whose box grew from an artifact of the baseline",
    ),
)

Source = Literal["tokens", "queries", "keys", "values"]


class Settings(ProtocolSettings):
    """Discovery of one object a picture; the first of each list is the fixed combination."""

    algorithm: Literal["lost", "tokencut"] = "lost"
    """What finds the object."""
    layout: str = "auto"
    """Layout of the dataset: voc, coco, boxes (images, boxes.json or boxes.csv) or masks (images/, masks/ of
    0 and 255); auto tells it by its folders."""
    names: str | None = None
    """File of the images to use, a name or number a line; unset means VOC's trainval, COCO20k's list, or all
    of a folder."""
    hard: bool = True
    """Count VOC's objects marked difficult or truncated, as LOST does on VOC07 and VOC12."""
    components: bool = False
    """Give each connected part of a mask a box of its own, instead of one box around all."""
    count: PositiveInt | None = None
    """Pictures drawn by the seed; unset means all."""
    reading: FeatureConfig = FeatureConfig(fit="pad", unit=True)
    """Canvas of the pictures; source and layer are those of the sweep."""
    sources: tuple[Source, ...] = Field(("keys", "queries", "values"), min_length=1)
    """What is read of attention, or tokens."""
    layers: tuple[int, ...] = Field((-1, -2, -3, -4), min_length=1)
    """Blocks that are read, 0-based or negative from the end."""
    biases: tuple[float, ...] = Field((0.0, -0.25, -0.5, -0.75), min_length=1)
    """Added to the similarities of LOST; of features of length 1, -1 would leave none."""
    expansion: PositiveInt = 100
    """Patches of lowest degree among which LOST looks for more of the object."""
    tau: float = 0.2
    """Cosine from which TokenCut joins two patches."""


PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    # One combination, as the papers have it; LOST multiplies keys as they are.
    "lost": {"sources": ["keys"], "layers": [-1], "biases": [0.0], "reading.unit": False},
    "tokencut": {"algorithm": "tokencut", "sources": ["keys"], "layers": [-1]},
}


class Combination(NamedTuple):
    """What is read of a model, and how it is used."""

    source: Source
    layer: int
    bias: float | None
    """None of TokenCut, which has none."""

    def __str__(self) -> str:
        bias = "" if self.bias is None else f", bias {self.bias:g}"
        return f"{self.source} of block {self.layer}{bias}"


def is_stochastic(_data: str, settings: Settings) -> bool:
    """Pictures are, where there are to be fewer."""
    return settings.count is not None


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Looks for an object in every picture with every combination.

    Returns:
        `corloc` of the best combination, `corloc_first` of the first; with a baseline `artifact_seeds`, the
        share of pictures in which the best combination starts at an artifact of the baseline.

    Raises:
        DataError: The dataset is of no known layout, or a file of it is wrong.
        PhregError: The model has no such block, or takes no such size.
    """
    for source in settings.sources:  # before any picture is read
        settings.reading.model_copy(update={"source": source}).check_views(settings.reading.views)
    boxed, chosen = _open(data, settings, seed)
    places = artifact_places(reader, Subset(boxed.images, chosen), settings.reading)

    combinations = list(sweep(settings))
    hits = torch.zeros(len(chosen), len(combinations), dtype=torch.bool)
    at_artifact = torch.zeros_like(hits)
    for number, found in enumerate(_search(reader, boxed, chosen, settings)):
        for place, (box, discovery) in enumerate(found):
            hits[number, place] = is_localised(box, boxed.boxes[chosen[number]])
            if places is not None:
                at_artifact[number, place] = _marks(places[number], discovery)
    boxes = sum(len(boxed.boxes[number]) for number in chosen)
    found = _metrics(combinations, hits, at_artifact if places is not None else None, boxes, boxed.without)
    best = [str(which) for which in combinations].index(found.notes["best"])
    shares = {"corloc": hits[:, best], "corloc_first": hits[:, 0]}
    if places is not None:
        shares["artifact_seeds"] = at_artifact[:, best]
    pictures = [boxed.images.name(number) for number in chosen]
    return replace(
        found,
        notes={**found.notes, "readout": reader.readout(settings.reading)},
        **resample(pictures, {name: PerPicture.mean(hit.numpy()) for name, hit in shares.items()}),
    )


def examples(
    reader: FeatureReader,
    data: str,
    settings: Settings,
    seed: int,
    notes: Mapping[str, Any],
    *,
    count: int = 8,
) -> list[Example]:
    """Looks for an object in the first pictures again, with the best combination, and keeps the steps.

    The patch that an object was grown from is marked in each map: where it lies in the background at a patch
    that resembles nothing, an artifact was taken for the object.

    Args:
        reader: The model.
        data: As in `run`, like the next two.
        settings: Of the task.
        seed: Decides which pictures there are, where `count` is set.
        notes: What `run` noted, the best combination too.
        count: Pictures, at most.

    Returns:
        Of each picture the picture itself with true and found boxes, and the maps that led to them.
    """
    boxed, chosen = _open(data, settings, seed)
    source, layer, bias = next(which for which in sweep(settings) if str(which) == notes["best"])
    alone = {"sources": (source,), "layers": (layer,), "biases": settings.biases if bias is None else (bias,)}
    found = _search(reader, boxed, chosen[:count], settings.model_copy(update=alone))
    return [
        _example(np.array(boxed.images.read(number)), boxed.boxes[number], box, discovery)
        for number, ((box, discovery),) in zip(chosen, found, strict=False)
    ]


def _example(
    picture: UInt8[np.ndarray, "height width 3"],
    truth: Float[Tensor, "objects 4"],
    box: Float[Tensor, " 4"],
    discovery: Discovery,
) -> Example:
    boxes = [
        *(LabelledBox(sides, "true box", found=False) for sides in truth),
        LabelledBox(box, "box found", found=True),
    ]
    seed = Mark(*discovery.seed, "patch it was grown from")
    maps = [Panel(step, title, marks=[seed]) for title, step in discovery.maps.items()]
    return [Panel(picture, boxes=boxes), *maps]


def sweep(settings: Settings) -> Iterator[Combination]:
    """Lists what is tried, the fixed combination first."""
    biases = settings.biases if settings.algorithm == "lost" else (None,)
    return (
        Combination(source, layer, bias)
        for layer, source, bias in product(settings.layers, settings.sources, biases)
    )


def discover(grid: Float[Tensor, "rows cols dim"], combination: Combination, settings: Settings) -> Discovery:
    """Finds the object of one picture, with the maps that lead to it."""
    if combination.bias is None:
        return tokencut(grid, tau=settings.tau)
    return lost(grid, bias=combination.bias, expansion=settings.expansion)


def box_in_picture(
    box: tuple[int, int, int, int], grid: tuple[int, int], placement: Placement
) -> Float[Tensor, " 4"]:
    """Lays a box of patches onto the picture, in its own pixels; what lies in the padding is cut off.

    Args:
        box: Left, top, right, bottom, in patches.
        grid: Patches of the canvas, (rows, cols).
        placement: Where the picture lies on the canvas.
    """
    top, left, height, width = placement.inside
    offset = torch.tensor([left, top, left, top])
    patch = torch.tensor([placement.canvas[1] / grid[1], placement.canvas[0] / grid[0]]).repeat(2)
    inside = torch.tensor([width, height, width, height])
    shown = (torch.tensor(box) * patch - offset).clamp(min=torch.zeros(4), max=inside)
    part_top, part_left, part_height, part_width = placement.part
    scale = torch.tensor([part_width / width, part_height / height]).repeat(2)
    return shown * scale + torch.tensor([part_left, part_top, part_left, part_top])


def _open(data: str, settings: Settings, seed: int) -> tuple[Boxed, list[int]]:
    """Lists the pictures with their boxes, and the numbers of those that are used."""
    names = None if settings.names is None else Path(settings.names)
    boxed = open_boxed(data, Choice(names, settings.hard, settings.components), layout=settings.layout)
    return boxed, _draw(len(boxed), settings.count, seed)


def _draw(total: int, count: int | None, seed: int) -> list[int]:
    if count is None:
        return list(range(total))
    order = torch.randperm(total, generator=keyed_generator("discovery", seed))
    return sorted(order[:count].tolist())


def _marks(places: Bool[Tensor, "rows cols"], discovery: Discovery) -> bool:
    """Tells whether the middle of the seed is marked; the marks' patches may be of another size."""
    row, col = (
        int((index + 0.5) * side / own)
        for index, side, own in zip(discovery.seed, places.shape, discovery.component.shape, strict=True)
    )
    return bool(places[row, col])


def _search(
    reader: FeatureReader, boxed: Boxed, chosen: list[int], settings: Settings
) -> Iterator[list[tuple[Float[Tensor, " 4"], Discovery]]]:
    """Finds an object in each picture with each combination, in the order of `sweep`."""
    combinations = list(sweep(settings))
    asked = list(dict.fromkeys((source, layer) for source, layer, _ in combinations))
    readings = [
        settings.reading.model_copy(update={"source": source, "layer": layer}) for source, layer in asked
    ]
    stream = reader.stream_each(Subset(boxed.images, chosen), readings, "looking for objects")
    for number, read in zip(chosen, stream, strict=True):
        placement = read[0].placement
        boxed.check(number, placement.picture_size)
        grids = {which: dense.grid.to(reader.device) for which, dense in zip(asked, read, strict=True)}
        found = []
        for combination in combinations:
            grid = grids[combination[:2]]
            discovery = discover(grid, combination, settings)
            found.append(
                (box_in_picture(discovery.box, (grid.shape[0], grid.shape[1]), placement), discovery)
            )
        yield found


def _metrics(
    combinations: list[Combination],
    hits: Bool[Tensor, "pictures combinations"],
    at_artifact: Bool[Tensor, "pictures combinations"] | None,
    boxes: int,
    without: int,
) -> Metrics:
    shares = hits.double().mean(0)
    best = int(shares.argmax())
    corloc = float(shares[best])
    figures = {"corloc": corloc, "corloc_first": float(shares[0])}
    detail = {"corloc": {str(which): float(share) for which, share in zip(combinations, shares, strict=True)}}
    if at_artifact is not None:
        starts = at_artifact.double().mean(0)
        figures["artifact_seeds"] = float(starts[best])
        detail["artifact_seeds"] = {
            str(which): float(share) for which, share in zip(combinations, starts, strict=True)
        }
    notes = {
        "sweep": "corloc",
        "best": str(combinations[best]),
        "first": str(combinations[0]),
        "pictures": len(hits),
        "pictures_without_boxes": without,
        "standard_error": math.sqrt(corloc * (1 - corloc) / len(hits)),
    }
    counts = {name: {"images": len(hits), "boxes": boxes} for name in figures}
    if at_artifact is not None:
        counts["artifact_seeds"] = {"images": len(hits)}
    return Metrics(figures, detail, notes, counts=counts)
