"""A picture of what a method did: photographs, and patch features before, after, and averaged over views.

    python benchmarks/methods/picture.py MODEL RUN --images A.jpg B.jpg --size 224 --output FILE.png

Features are drawn as colours: three principal components as red, green and blue, the same in all maps. The
last column is the raw model averaged over 10 moved views, which is what a student is taught. With --norms,
norms of the last block's tokens are drawn instead, dark to bright on one scale, and there is no average.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import phreg
from phreg.api import open_model
from phreg.backbones.base import Backbone
from phreg.data.crops import centre_crops, denormalise
from phreg.data.sources import open_images
from phreg.report.maps import norm_map, pca_maps, sheet

VIEWS = 10
"""Views in the average."""


@torch.no_grad()
def norms(model: Backbone, images: torch.Tensor) -> torch.Tensor:
    """Norms of the patch tokens of the last block, (images, rows, cols)."""
    last = len(model.blocks) - 1
    return model.layout(images).to_grid(model.block_tokens(images, [last])[last]).norm(dim=-1)


@torch.no_grad()
def columns(before: Backbone, after: Backbone, images: torch.Tensor, *, by_norm: bool) -> list[np.ndarray]:
    """Draws the maps of all images, a column for each way to read them."""
    side = max(images.shape[-2:])
    if by_norm:
        found = [norms(model, images) for model in (before, after)]
        low, high = (float(found[0].flatten().quantile(share)) for share in (0.01, 1.0))
        return [np.stack([norm_map(one, low, high, side) for one in maps]) for maps in found]
    average = phreg.denoise(before.model, images, count=VIEWS, fill="reflect", seed=0)
    return pca_maps(before(images).patches, after(images).patches, average, side=side)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the model as it is")
    parser.add_argument("run", help="what a method made of it")
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--size", type=int, help="side of the images; unset means the model's own")
    parser.add_argument("--norms", action="store_true", help="draw norms instead of colours")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    before, after = (open_model(name)[0].eval() for name in (options.model, options.run))
    size = before.image_size(options.size)
    images = torch.cat(list(centre_crops(before, open_images(options.images), size)))
    photos = np.stack([denormalise(image, before.spec.mean, before.spec.std) for image in images])
    maps = columns(before, after, images, by_norm=options.norms)
    tiles = np.stack([photos, *(drawn[:, : size[0], : size[1]] for drawn in maps)], axis=1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet(tiles)).quantize(255).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
