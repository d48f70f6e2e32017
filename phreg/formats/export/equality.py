"""Whether the model that was read back is the one that was exported: both run on the same random images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.formats.export.spec import TOLERANCE, FormatSpec, Graph
from phreg.record import Equality
from phreg.seeding import keyed_generator


def other_sizes(backbone: Backbone) -> list[tuple[int, int]]:
    """Picks a smaller and a larger size, neither of them square."""
    (high, wide), (height, width) = backbone.spec.patch_size, backbone.spec.input_size
    rows, cols = height // high, width // wide
    smaller = (max(1, rows * 3 // 4) * high, max(1, cols // 2) * wide)
    larger = ((rows * 5 // 4) * high, (cols * 3 // 2) * wide)
    return [smaller, larger]


def measure(
    backbone: Backbone,
    exported: Backbone | Graph,
    spec: FormatSpec,
    sizes: Sequence[tuple[int, int]],
    tolerance: float = TOLERANCE,
) -> list[Equality]:
    """Compares a model with the one that was exported, size by size.

    Args:
        backbone: The model that was exported.
        exported: What its folder was read back as.
        spec: The format.
        sizes: Image sizes, (height, width).
        tolerance: Largest relative difference that counts as equal.
    """
    # Libraries differ in what they count as the head and what they call pooled. Where one's model became
    # another's, what calling it returns is compared instead, at every size.
    converted = isinstance(exported, Backbone) and exported.spec.library != backbone.spec.library
    if isinstance(exported, Backbone):
        exported.to(backbone.device, backbone.dtype)
    figures = []
    with _evaluating(backbone.model), torch.no_grad():
        for size in sizes:
            images = torch.randn(2, 3, *size, generator=keyed_generator("export", *size))
            images = images.to(backbone.device, backbone.dtype)
            if isinstance(exported, Backbone):
                pairs = list(zip(_outputs(exported, images), _outputs(backbone, images), strict=True))
                if converted:
                    pairs.pop()
                if converted or size == backbone.spec.input_size:
                    pairs.append((spec.answer(exported, images), spec.answer(backbone, images)))
            else:
                pairs = list(zip(exported(images), backbone(images), strict=True))
            figures.append(_compare(size, pairs, tolerance))
    return figures


def _outputs(backbone: Backbone, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
    """Reads all tokens behind the last block, prefix and registers among them, and the pooled output."""
    last = len(backbone.blocks) - 1
    with backbone.tap([last]) as found:
        pooled = backbone.run(images)
    return backbone.final_norm(found[last]), pooled


def _compare(
    size: tuple[int, int], pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float = TOLERANCE
) -> Equality:
    differences, relative = [], []
    for found, expected in pairs:
        difference = (found - expected).abs().max().double()
        largest = expected.abs().max().double()
        differences.append(difference)
        relative.append(difference / largest.clamp_min(torch.finfo(torch.float32).tiny))
    # torch's maximum, unlike Python's, is NaN where any is, and NaN is never within the tolerance.
    worst = torch.stack(relative).max().item()
    return Equality(size, torch.stack(differences).max().item(), worst, worst <= tolerance)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, and afterwards each part back in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
