"""Compares features with a reference free of artifacts, and global outputs with the original model's.

Agreement asks whether dense features came closer to a clean reference, such as a teacher that averages many
views; it is reported over all patches, for the worst of them, and for the patches that used to be artifacts
alone. Drift asks what that cost: how far the CLS or pooled output moved.

Channels mean the same in a network and in what was trained from it, and nowhere else (`incomparable_reason`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from phreg.backbones.base import Backbone
from phreg.errors import PhregError

MIN_SHARED_COSINE = 0.5
"""Least cosine of two models' patch embeddings where one was trained from the other: it is about 1 of a
student and its original, and about 0 of networks trained apart."""


@dataclass(frozen=True)
class Agreement:
    """Cosine similarity of patch features to a reference.

    Attributes:
        mean: Mean over all patches.
        worst_percent: The cosine that 99 % of the patches reach.
        masked: Mean over the masked patches alone, such as former artifacts; None where none is masked.
        patches: Number of patches compared.
        masked_patches: Number of those that are masked.
    """

    mean: float
    worst_percent: float
    masked: float | None
    patches: int
    masked_patches: int


class AgreementMeter:
    """Measures agreement batch by batch; keeps one float a patch."""

    def __init__(self) -> None:
        self._cosines: list[Tensor] = []
        self._masks: list[Tensor] = []

    def update(
        self,
        features: Float[Tensor, "batch rows cols dim"],
        reference: Float[Tensor, "batch rows cols dim"],
        mask: Bool[Tensor, "batch rows cols"] | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            features: Patch features.
            reference: What they should point along.
            mask: Patches that are also reported on their own.
        """
        # In fp32: half-precision cosines are off in the third digit.
        cosines = cosine_similarity(features.float(), reference.float(), dim=-1)
        mask = torch.zeros_like(cosines, dtype=torch.bool) if mask is None else mask
        self._cosines.append(cosines.flatten().cpu())
        self._masks.append(mask.flatten().cpu())

    def merge(self, other: "AgreementMeter") -> None:
        """Adds all batches of another meter."""
        self._cosines += other._cosines
        self._masks += other._masks

    def compute(self) -> Agreement:
        """Returns the agreement over all batches so far.

        Raises:
            PhregError: There were none.
        """
        if not sum(map(Tensor.numel, self._cosines)):
            raise PhregError("agreement asked for of no features; update the meter with at least one batch")
        cosines, mask = torch.cat(self._cosines).double(), torch.cat(self._masks)
        # The rank is exact, where torch.quantile refuses more than 16 million values.
        rank = 1 + int(0.01 * (cosines.numel() - 1))
        return Agreement(
            mean=float(cosines.mean()),
            worst_percent=float(cosines.kthvalue(rank).values),
            masked=float(cosines[mask].mean()) if mask.any() else None,
            patches=cosines.numel(),
            masked_patches=int(mask.sum()),
        )


def agreement(
    features: Float[Tensor, "batch rows cols dim"],
    reference: Float[Tensor, "batch rows cols dim"],
    mask: Bool[Tensor, "batch rows cols"] | None = None,
) -> Agreement:
    """Measures the agreement of one batch; see `AgreementMeter` for many."""
    meter = AgreementMeter()
    meter.update(features, reference, mask)
    return meter.compute()


def incomparable_reason(backbone: Backbone, other: Backbone) -> str | None:
    """Says why patch features of two models cannot be set against each other; None where they can."""
    names = backbone.describe(), other.describe()
    patches, widths = zip(
        *((side.spec.patch_size, side.spec.width) for side in (backbone, other)), strict=True
    )
    if patches[0] != patches[1]:
        return f"{names[0]} has patches of {patches[0]} pixels, {names[1]} of {patches[1]}"
    if widths[0] != widths[1]:
        return f"{names[0]} has features of {widths[0]} channels, {names[1]} of {widths[1]}"
    ours, theirs = _patch_embedding(backbone), _patch_embedding(other)
    if ours.shape != theirs.shape or float(cosine_similarity(ours, theirs, dim=0)) < MIN_SHARED_COSINE:
        return f"{names[0]} and {names[1]} are two networks, neither of which was trained from the other"
    return None


def _patch_embedding(backbone: Backbone) -> Float[Tensor, " weights"]:
    """Reads the weight by which pixels become tokens, which no retrofit changes much."""
    parameters = (backbone.model.get_parameter(name) for name in backbone.roles()["patch_embed"])
    return max(parameters, key=Tensor.numel).detach().flatten().float()


@dataclass(frozen=True)
class Drift:
    """Cosine similarity of global outputs to the original model's: 1 is no drift.

    Attributes:
        mean: Mean over images.
        min: The image that drifted furthest.
    """

    mean: float
    min: float


def drift(pooled: Float[Tensor, "images dim"], original: Float[Tensor, "images dim"]) -> Drift:
    """Measures how far global outputs (CLS or pooled) moved from the original model's.

    Raises:
        PhregError: There are no images.
    """
    if not len(pooled):
        raise PhregError("drift asked for of no global outputs; give those of at least one image")
    cosines = cosine_similarity(pooled.float(), original.float(), dim=-1)
    return Drift(mean=float(cosines.mean()), min=float(cosines.min()))
