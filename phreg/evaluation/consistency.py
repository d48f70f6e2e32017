"""Compares features with a reference free of artifacts, and global outputs with the original model's.

Agreement asks whether dense features came closer to a clean reference, such as a teacher that averages many
views; it is reported over all patches, for the worst of them, and for the patches that used to be artifacts
alone. Drift asks what that cost: how far the CLS or pooled output moved.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from phreg.errors import PhregError


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

    def compute(self) -> Agreement:
        """Returns the agreement over all batches so far.

        Raises:
            PhregError: There were none.
        """
        if not self._cosines:
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
