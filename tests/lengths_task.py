"""Lengths: how long patch features are, and how many point one way. A task as small as one can be."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from phreg.config import Config
from phreg.data.sources import open_images
from phreg.evaluation.examples import Mark, Panel
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.record import Metrics, MetricSpec

DATA = "any images"
TREE = """photos/
  0001.jpg …"""
METRICS = (
    MetricSpec("aligned", about="share of patches that point one way"),
    MetricSpec("length", "norm", better="lower", label="mean length", about="of patch features"),
)


class Settings(Config):
    """Those of reading."""

    reading: FeatureConfig = FeatureConfig(size=32)
    """Canvas of the pictures."""


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    grids = torch.stack([dense.grid for dense in reader.stream(open_images(data), settings.reading)])
    patches = grids.flatten(0, 2)
    aligned = cosine_similarity(patches, patches.mean(0, keepdim=True)) > 0
    figures = {"aligned": float(aligned.float().mean()), "length": float(patches.norm(dim=1).mean())}
    over = {"patches": len(patches), "images": len(grids)}
    return Metrics(figures, notes={"shown": 2}, guarded=["length"], counts=dict.fromkeys(figures, over))


def examples(
    reader: FeatureReader, data: str, settings: Settings, seed: int, notes: Mapping[str, Any]
) -> list[list[Panel]]:
    """The lengths in the first pictures, the longest marked."""
    found = []
    for dense, _ in zip(
        reader.stream(open_images(data), settings.reading), range(notes["shown"]), strict=False
    ):
        lengths = dense.grid.norm(dim=-1)
        longest = divmod(int(lengths.argmax()), lengths.shape[1])
        found.append([Panel(lengths), Panel(-lengths, "upside down", marks=[Mark(*longest, "longest")])])
    return found
