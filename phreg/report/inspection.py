"""Writes what an inspection found into a folder: inspect.json, report.html and pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phreg.analysis.norms import NormReport
from phreg.backbones.base import Backbone
from phreg.checkpoint import write_text
from phreg.report import figures
from phreg.report.html import inspection_page, write_report


@torch.no_grad()
def write_inspection(
    folder: Path, name: str, backbone: Backbone, looked_at: Sequence[Tensor], report: NormReport
) -> None:
    """Writes the folder.

    Args:
        folder: Folder to write; what is there is replaced.
        name: What the model is called.
        backbone: The model.
        looked_at: The normalised images that were measured, in batches.
        report: What was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "inspect.json", json.dumps({"model": name} | report.to_json(), indent=2))
    shown = photos(backbone, looked_at)
    features = torch.cat([backbone(images).patches.float().cpu() for images in looked_at[: len(report.maps)]])
    write_report(folder / "report.html", inspection_page(name, report, shown, features[: len(report.maps)]))
    figures.save_png(folder / "positions.png", figures.position_map(report.position_histogram))
    figures.save_png(folder / "norms.png", figures.norm_quantiles(report))
    low, high = report.maps.min().item(), report.maps[:, report.focus].max().item()
    for number, norms in enumerate(report.maps[:, report.focus], start=1):
        figures.save_png(folder / f"norms-{number:02}.png", figures.norm_map(norms, low, high))


def photos(backbone: Backbone, looked_at: Sequence[Tensor], count: int = 8) -> list[Any]:
    """The first images as they look, 8-bit RGB."""
    first = torch.cat(list(looked_at[:count]))[:count].cpu()
    return [figures.photo(image, backbone.spec.mean, backbone.spec.std) for image in first]
