"""Looks at a model from all sides in one pass over the images.

Norms, attention and patch embeddings are captured in the same forward pass. Which tokens are outliers is
known only when all norms are. What is asked about outliers is therefore stored for every patch, as one float
each, and summed up at the end.

    batches ──run, once──┬─ taps on the blocks ──► norms        ─┬─► NormReport ──► outliers
                         ├─ attention          ──► first query's ─┼─────────────────────┼──► AttentionReport
                         ├─ patch embedding    ──► cosines       ─┼─────────────────────┴──► NeighbourReport
                         └─ first images       ──► kept whole    ─┴─► ShownImage

Tokens of one batch, all blocks, are in memory at a time. What stays, on the CPU, is three floats a patch and
block (norms before and after the final norm, attention), two a patch, and the images shown with their
features of the last block: for 64 images of 1024 patches and a model of 24 blocks, 19 MB, and 4 MB more for
each image shown by a model 1024 wide.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from phreg.analysis.attention import (
    AttentionReport,
    attention_report,
    capture_maps,
    complete_capture,
    query_names,
)
from phreg.analysis.gap import outlier_mask
from phreg.analysis.neighbours import (
    NeighbourReport,
    contrast,
    neighbour_cosines,
    neighbour_report,
    patch_embeddings,
)
from phreg.analysis.norms import NormReport, Norms, join, norm_report, of_one_size, token_norms
from phreg.backbones.base import Backbone
from phreg.errors import UnsupportedModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ShownImage:
    """One image, and what the model makes of it.

    Attributes:
        image: The image, normalised.
        norms: Norms of the patch tokens, block by block, before the final norm.
        features: Patch tokens of the last block, after the final norm.
        attention: Where the queries of `AttentionReport` look in the last block, head by head; None where
            attention cannot be listened to.
    """

    image: Float[Tensor, "3 height width"]
    norms: Float[Tensor, "blocks rows cols"]
    features: Float[Tensor, "rows cols dim"]
    attention: Float[Tensor, "queries heads rows cols"] | None


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over the images tells of a model.

    Attributes:
        norms: Norms of all tokens, in every block.
        outliers: Which patches are outliers in the block that `norms.focus` names.
        attention: Where CLS and registers look, and how much at outliers; None where attention cannot be
            listened to.
        neighbours: What kind of patch becomes an outlier.
        pooled: The model's pooled output, in fp32.
        shown: The first images.
    """

    norms: NormReport
    outliers: Bool[Tensor, "images rows cols"]
    attention: AttentionReport | None
    neighbours: NeighbourReport
    pooled: Float[Tensor, "images dim"]
    shown: tuple[ShownImage, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the reports as JSON can hold them: that of norms, and beside it the others by name."""
        return self.norms.to_json() | {
            "attention": self.attention.to_json() if self.attention else None,
            "neighbours": self.neighbours.to_json(),
        }


@torch.no_grad()
def survey(
    backbone: Backbone,
    batches: Iterable[Float[Tensor, "_ 3 _ _"]],
    *,
    show: int = 8,
    original: NormReport | None = None,
) -> Survey:
    """Measures norms, attention and patch embeddings in one pass.

    The model runs in the mode it is in; put it in eval mode first.

    Args:
        backbone: The model.
        batches: Normalised images, all of one size.
        show: Images, from the first on, that are kept whole.
        original: Norms of the model before it was changed, on the same images. Its gaps count too.

    Raises:
        DataError: There are no images, or their sizes differ.
        PhregError: A norm is not finite, or the model's adapter does not know its patch embedding.
    """
    batch_results: list[_BatchResult] = []
    shown: list[ShownImage] = []
    for images in of_one_size(backbone, batches):
        result, examples = _read(backbone, images, show - len(shown))
        batch_results.append(result)
        shown += examples
    norms = join([result.norms for result in batch_results])
    report = norm_report(backbone, norms, range(len(backbone.blocks)), show, original)
    outliers = outlier_mask(norms.patches[0, report.focus], report.blocks[report.focus].gap)
    return Survey(
        norms=report,
        outliers=outliers,
        attention=_attention_report(backbone, batch_results, outliers),
        neighbours=neighbour_report(
            torch.cat([result.cosines for result in batch_results]),
            torch.cat([result.contrasts for result in batch_results]),
            outliers,
        ),
        pooled=torch.cat([result.pooled for result in batch_results]),
        shown=tuple(shown),
    )


class _BatchResult(NamedTuple):
    """What is kept of a batch, on the CPU."""

    norms: Norms
    cosines: Float[Tensor, "batch rows cols"]
    contrasts: Float[Tensor, "batch rows cols"]
    attention: list[Float[Tensor, "batch rows cols"]]
    """The first query's, mean over heads, for as many blocks as could be captured."""
    pooled: Float[Tensor, "batch dim"]
    focus: Float[Tensor, "queries rows cols"] | None
    """All queries' in the last block, mean over heads, sum over images; None where it was not captured."""


def _read(
    backbone: Backbone, images: Float[Tensor, "batch 3 height width"], show: int
) -> tuple[_BatchResult, list[ShownImage]]:
    """Runs the model on a batch; the first `show` images are kept whole."""
    layout, depth = backbone.layout(images), len(backbone.blocks)
    with (
        backbone.tap(range(depth)) as tokens,
        capture_maps(backbone, images) as maps,
        patch_embeddings(backbone, layout) as embedded,
    ):
        pooled = backbone.run(images)
    norms = token_norms(backbone, images, tokens)
    last = maps[depth - 1] if len(maps) >= depth else None
    result = _BatchResult(
        norms=norms,
        cosines=neighbour_cosines(embedded[-1]).cpu(),
        contrasts=contrast(backbone, images).cpu(),
        attention=[block[:, 0].mean(dim=1).cpu() for block in maps],
        pooled=pooled.float().cpu(),
        focus=None if last is None else last.mean(dim=2).sum(dim=0).cpu(),
    )
    features = backbone.final_norm(layout.to_grid(tokens[depth - 1])[:show])
    examples = [  # copies, since a view would keep its batch in memory
        ShownImage(
            image=images[index].cpu().clone(),
            norms=norms.patches[0, :, index].clone(),
            features=features[index].float().cpu().clone(),
            attention=None if last is None else last[index].cpu().clone(),
        )
        for index in range(len(features))
    ]
    return result, examples


def _attention_report(
    backbone: Backbone, batch_results: Sequence[_BatchResult], outliers: Bool[Tensor, "images rows cols"]
) -> AttentionReport | None:
    try:
        blocks = zip(*(complete_capture(backbone, result.attention) for result in batch_results), strict=True)
    except UnsupportedModelError as error:
        logger.warning("where the model looks is left out: %s", error)
        return None
    focus = torch.stack([result.focus for result in batch_results if result.focus is not None]).sum(dim=0)
    ahead = len(backbone.special_tokens)
    return attention_report(
        queries=query_names(backbone),
        focus=focus / len(outliers),
        first=torch.stack([torch.cat(block) for block in blocks]),
        outliers=outliers,
        num_tokens=ahead + outliers[0].numel(),
    )
