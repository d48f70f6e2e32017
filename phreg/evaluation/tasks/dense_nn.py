"""Dense nearest neighbours: segmentation by looking patches up, without any training.

    training images ──► patch features, and the share of each class in them ──► memory bank
    test images ──► patch features ──k nearest, softmax(cosine / temperature)──► class shares ──► pixels

What a patch is taken for is the weighted mean of what its neighbours show, as in "Towards In-Context Scene
Understanding" (Balažević et al. 2023, arXiv 2306.01667). Here the bank holds the same number of patches of
every image, drawn evenly; theirs prefers patches of rare classes.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

from phreg.errors import DataError
from phreg.evaluation.datasets.masks import Segmentation
from phreg.evaluation.dense import Dense
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.record import Metrics
from phreg.evaluation.tasks.segmentation import (
    SEGMENTATION_METRICS,
    SegmentationSettings,
    measure_segmentation,
    patch_shares,
)
from phreg.seeding import keyed_generator

DATA = "images with masks of classes, for training and testing: a folder in one of the layouts"
METRICS = SEGMENTATION_METRICS

AT_ONCE = 4096
"""Patches that are looked up at a time."""


class Settings(SegmentationSettings):
    """Segmentation by nearest neighbours of patches."""

    bank_size: PositiveInt = 50_000
    """Patches in the memory bank."""
    neighbours: PositiveInt = 30
    """Neighbours that vote."""
    temperature: PositiveFloat = 0.02
    """Temperature of their votes."""


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Fills the bank from the training split and labels the validation split.

    Raises:
        DataError: The dataset is of no known layout, or a file of it is wrong.
    """
    train, test = settings.open(data, "train"), settings.open(data, "val")
    bank, shares = _fill(reader, train, settings, seed)

    def score(dense: Dense) -> Tensor:
        queries = dense.grid.flatten(0, 1).to(reader.device)
        found = look_up(bank, shares, queries, settings.neighbours, settings.temperature)
        return found.unflatten(0, dense.grid.shape[:2]).permute(2, 0, 1)

    found = measure_segmentation(reader, test, settings.reading, score)
    return replace(found, notes={**found.notes, "bank": len(bank)})


def look_up(
    bank: Float[Tensor, "patches dim"],
    shares: Float[Tensor, "patches classes"],
    queries: Float[Tensor, "queries dim"],
    neighbours: int,
    temperature: float,
) -> Float[Tensor, "queries classes"]:
    """Averages what the nearest patches of a bank show, weighted by softmax(cosine / temperature).

    Args:
        bank: Features of length 1.
        shares: What each shows.
        queries: Features of any length.
        neighbours: How many are averaged.
        temperature: How much more the nearer ones count.
    """
    found = []
    for part in normalize(queries, dim=1).split(AT_ONCE):
        cosines, nearest = (part @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        weights = (cosines / temperature).softmax(dim=1)
        found.append((weights.unsqueeze(-1) * shares[nearest]).sum(1))
    return torch.cat(found)


def _fill(reader: FeatureReader, train: Segmentation, settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the same number of patches from each image; those that show nothing that counts are left out."""
    each = max(1, settings.bank_size // len(train))
    features, shares = [], []
    for number, dense in enumerate(reader.stream(train.images, settings.reading, "training images")):
        grid = dense.grid.shape[0], dense.grid.shape[1]
        shown = patch_shares(train, number, dense.placement, grid).flatten(0, 1)
        counted = (shown.sum(1) > 0).nonzero().flatten()
        order = torch.randperm(len(counted), generator=keyed_generator("bank", seed, number))
        chosen = counted[order[:each]]
        features.append(normalize(dense.grid.flatten(0, 1)[chosen], dim=1))
        shares.append(shown[chosen])
    if not any(map(len, shares)):
        raise DataError(
            f"none of the patches of the {len(train)} training images shows a class, of masks such as "
            f"{train.masks[0]}, which are read at the size of the canvas; raise reading.size, or label more "
            "pixels"
        )
    return torch.cat(features).to(reader.device), torch.cat(shares).to(reader.device)
