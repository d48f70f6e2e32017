"""Anomaly detection: how well the distance to patches of normal pictures tells defects.

    normal pictures ──► patch features ──(greedy coreset)──► memory bank
    test pictures ────► patch features ──distance to the nearest──► map ──┬─ mean of the highest ──► image
                                                                          └─ resampled, blurred ───► pixels

That is PatchCore (Roth et al. 2022, arXiv 2106.08265) in its form for vision transformers, AnomalyDINO (Damm
et al. 2025, arXiv 2405.14529): nothing is trained. A category has a bank of its own, and figures are means
over categories.

Image and pixel AUROC are areas under the ROC curve over all test pictures of a category, and over all their
pixels at the picture's own resolution. PRO is the area under the curve of per-region overlap, up to a share
of falsely found pixels of 0.3. All three are exact.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize

from phreg.config import Fraction
from phreg.data.sources import Subset
from phreg.errors import DataError
from phreg.evaluation.datasets.anomalies import InspectedParts, open_anomalies
from phreg.evaluation.dense import Dense, Placement
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.metrics.anomaly import auroc, region_overlap
from phreg.evaluation.protocol import RESAMPLING, ProtocolSettings
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.progress import track
from phreg.seeding import keyed_generator

DATA = "normal pictures, and pictures with defects and their masks: a folder in the layout of MVTec AD"
TREE = """mvtec/
  bottle/train/good/000.png                      what is normal
  bottle/test/good/000.png
  bottle/test/broken_large/000.png               a folder a kind of defect
  bottle/ground_truth/broken_large/000_mask.png  its pixels, all but 0"""
METRICS = (
    MetricSpec("image_auroc", label="image AUROC", about="area under the ROC curve of pictures"),
    MetricSpec("pixel_auroc", label="pixel AUROC", about="area under the ROC curve of pixels"),
    MetricSpec("pro", label="PRO", about="overlap with regions, up to 30 % falsely found"),
)

AT_ONCE = 100_000_000
"""Distances that are held at a time, at most: 0.4 GB."""

CORESET_DIM, CORESET_STARTS = 128, 10
"""Channels that features are projected to when a coreset is chosen, and patches that it starts from."""


class Settings(ProtocolSettings):
    """Nearest neighbours of patches among those of normal pictures."""

    categories: tuple[str, ...] = ()
    """Categories that are measured; none means all."""
    shots: PositiveInt | None = None
    """Normal pictures of the bank, in the order of their names, the first seed's the first ones; unset means
    all."""
    reading: FeatureConfig = FeatureConfig(size=448)
    """Canvas of the pictures."""
    distance: Literal["cosine", "squared"] = "cosine"
    """Distance of patches: 1 - cosine, or the square of the Euclidean one."""
    neighbours: PositiveInt = 1
    """Nearest patches whose distances are averaged."""
    neighbourhood: NonNegativeInt = 0
    """Patches on each side that a feature is averaged with, along rows and columns; outside of the picture
    there are zeros. 1 is PatchCore's patch size of 3."""
    coreset: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the bank that is kept, chosen greedily so that what is left out is near; unset keeps all."""
    highest: Fraction = 0.01
    """Share of a picture's patches, those farthest away and one at least, whose mean distance is the score of
    the picture."""
    blur: NonNegativeFloat = 4.0
    """Standard deviation in pixels of the Gaussian that maps are blurred with."""
    pro_limit: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of falsely found pixels up to which PRO is integrated."""


PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "anomalydino": {
        "reading": {"size": 448, "fit": "keep"},
        "distance": "cosine",
        "neighbours": 1,
        "highest": 0.01,
        "blur": 4.0,
        "pro_limit": 0.3,
        "differs": (
            "the background is not masked by the first principal component",
            "normal pictures are not rotated",
            "pictures that are not whole patches are resampled to them, theirs cut off",
        ),
    },
    "patchcore": {
        "reading": {"size": 224, "resize": 256, "fit": "crop"},
        "distance": "squared",
        "neighbours": 1,
        "neighbourhood": 1,
        "coreset": 0.1,
        "highest": 0.0,
        "blur": 4.0,
        "differs": (
            RESAMPLING,
            "features are those of one block of the model, theirs of two stages of a WideResNet-50",
            "maps are blurred and compared at the size of each picture, theirs at 224 pixels",
        ),
    },
}
"""Those of the two official repositories, with sources in `phreg/evaluation/README.md`."""


def is_stochastic(_data: str, settings: Settings) -> bool:
    """The seed decides which normal pictures there are, where they are to be fewer, and the coreset."""
    return settings.shots is not None or settings.coreset is not None


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Fills a bank of each category, and measures how far test pictures are from it.

    Raises:
        DataError: The folder is of another layout, a file of it is wrong, or it has too few normal pictures.
    """
    detail: dict[str, dict[str, float]] = {spec.name: {} for spec in METRICS}
    over: dict[str, dict[str, int]] = {spec.name: {} for spec in METRICS}
    patches = {}
    for parts in track("categories", open_anomalies(data, settings.categories)):
        bank = fill_bank(reader, parts, settings, seed)
        patches[parts.name] = len(bank)
        scores, maps, masks = _test(reader, parts, bank, settings)
        found = {"image_auroc": auroc(scores, np.array(parts.defective))}
        counts = {"image_auroc": {"images": len(scores)}}
        if maps:
            pixels = np.concatenate([scores.ravel() for scores in maps])
            defects = np.concatenate([mask.ravel() for mask in masks])
            overlap, regions = region_overlap(maps, masks, settings.pro_limit)
            found |= {"pixel_auroc": auroc(pixels, defects), "pro": overlap}
            counts["pixel_auroc"] = {"pixels": len(pixels), "images": len(maps)}
            counts["pro"] = {"regions": regions, "images": len(maps)}
        for name, figure in found.items():
            detail[name][parts.name] = figure
            for unit, count in (counts[name] | {"categories": 1}).items():
                over[name][unit] = over[name].get(unit, 0) + count
    return _metrics(detail, over, {"bank": patches, "readout": reader.readout(settings.reading)})


def fill_bank(
    reader: FeatureReader, parts: InspectedParts, settings: Settings, seed: int
) -> Float[Tensor, "patches dim"]:
    """Reads the patches of normal pictures, and keeps a coreset of them where one is asked for.

    Raises:
        DataError: There are fewer normal pictures than asked for.
    """
    train = parts.train
    if settings.shots is not None:
        chosen = range(seed * settings.shots, (seed + 1) * settings.shots)
        if chosen.stop > len(train):
            raise DataError(
                f"shots={settings.shots} asked for of {parts.name} with seed {seed}, which takes pictures "
                f"{chosen.start} to {chosen.stop - 1} by their names, found {len(train)} in train/good; "
                "lower shots or the seed"
            )
        train = Subset(train, chosen)
    grids = [
        _prepared(dense, settings).flatten(0, 1)
        for dense in reader.stream(train, settings.reading, f"{parts.name}, normal pictures")
    ]
    bank = torch.cat(grids).to(reader.device)
    if settings.coreset is None:
        return bank
    return bank[greedy_coreset(bank, max(1, int(settings.coreset * len(bank))), seed)]


def greedy_coreset(features: Float[Tensor, "patches dim"], count: int, seed: int) -> Tensor:
    """Chooses patches one by one, each time the one farthest from those that were chosen (Roth et al., 3.2).

    Distances are of random projections to `CORESET_DIM` channels; the first patch is the one farthest on
    average from `CORESET_STARTS` patches drawn, whose mean distance also bounds all later distances, as in
    the official code.

    Returns:
        The numbers of the chosen patches, in their order.
    """
    generator = keyed_generator("coreset", seed)
    if features.shape[1] > CORESET_DIM:
        projection = torch.randn(features.shape[1], CORESET_DIM, generator=generator)
        features = features @ projection.to(features)
    starts = torch.randperm(len(features), generator=generator)[:CORESET_STARTS]
    away = torch.stack([(features - features[start]).norm(dim=1) for start in starts.tolist()]).mean(0)
    chosen = []
    for _ in track("choosing the bank", range(count)):
        chosen.append(int(away.argmax()))
        away = torch.minimum(away, (features - features[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def distances(
    bank: Float[Tensor, "patches dim"], queries: Float[Tensor, "queries dim"], settings: Settings
) -> Float[Tensor, " queries"]:
    """Measures how far patches are from their nearest neighbours in a bank, on average."""
    if settings.distance == "cosine":
        bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
    found = []
    for part in queries.split(max(1, AT_ONCE // len(bank))):
        apart = 1 - part @ bank.T if settings.distance == "cosine" else torch.cdist(part, bank).square()
        count = min(settings.neighbours, len(bank))
        found.append(apart.topk(count, dim=1, largest=False).values.mean(1))
    return torch.cat(found)


def image_score(apart: Float[Tensor, " patches"], share: float) -> float:
    """Averages the highest distances of a picture: that share of them, rounded down, and one at least."""
    return float(apart.topk(max(1, int(share * len(apart)))).values.mean())


def pixel_map(
    apart: Float[Tensor, "rows cols"], placement: Placement, blur: float
) -> Float[np.ndarray, "height width"]:
    """Lays distances of patches onto the shown part of a picture, and blurs them."""
    if placement.inside == (0, 0, *placement.canvas):  # without the canvas in between
        sides = placement.part[2:]
        pixels = interpolate(apart[None, None], sides, mode="bilinear", align_corners=False)[0, 0]
    else:
        pixels = placement.restore(apart[None])[0]
    values = pixels.cpu().numpy()
    return gaussian_filter(values, blur) if blur else values


def _prepared(dense: Dense, settings: Settings) -> Float[Tensor, "rows cols dim"]:
    """Averages features over their neighbourhood."""
    reach = settings.neighbourhood
    return avg_pool2d(dense.grid.permute(2, 0, 1), 2 * reach + 1, 1, reach).permute(1, 2, 0)


def _test(
    reader: FeatureReader, parts: InspectedParts, bank: Tensor, settings: Settings
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Scores the test pictures, and where there are masks their pixels."""
    scores, maps, masks = [], [], []
    stream = reader.stream(parts.test, settings.reading, f"{parts.name}, test pictures")
    for number, dense in enumerate(stream):
        grid = _prepared(dense, settings).to(reader.device)
        apart = distances(bank, grid.flatten(0, 1), settings).unflatten(0, grid.shape[:2]).cpu()
        scores.append(image_score(apart.flatten(), settings.highest))
        if parts.masks:
            place = dense.placement
            maps.append(pixel_map(apart, place, settings.blur))
            masks.append(place.cut(parts.mask(number, place.picture_size)).numpy())
    return np.array(scores), maps, masks


def _metrics(
    detail: Mapping[str, Mapping[str, float]], over: Mapping[str, Mapping[str, int]], notes: dict[str, Any]
) -> Metrics:
    """Averages over categories."""
    found = {name: parts for name, parts in detail.items() if parts}
    figures = {name: sum(parts.values()) / len(parts) for name, parts in found.items()}
    missing = {name: "no category has masks of its defects" for name in detail if name not in found}
    if missing:
        notes["left_out"] = missing
    return Metrics(figures, found, notes, counts={name: over[name] for name in found})
