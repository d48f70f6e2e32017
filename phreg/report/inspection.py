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
from phreg.report.canvas import save_png
from phreg.report.charts import norm_quantiles, position_map
from phreg.report.html import inspection_page, write_report
from phreg.report.maps import norm_map, photo


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
    save_png(folder / "positions.png", position_map(report.position_histogram))
    save_png(folder / "norms.png", norm_quantiles(report))
    low, high = report.maps.min().item(), report.maps[:, report.focus].max().item()
    for number, norms in enumerate(report.maps[:, report.focus], start=1):
        save_png(folder / f"norms-{number:02}.png", norm_map(norms, low, high))


def photos(backbone: Backbone, looked_at: Sequence[Tensor], count: int = 8) -> list[Any]:
    """The first images as they look, 8-bit RGB."""
    first = torch.cat(list(looked_at[:count]))[:count].cpu()
    return [photo(image, backbone.spec.mean, backbone.spec.std) for image in first]
