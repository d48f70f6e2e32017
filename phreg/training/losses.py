"""The loss terms, each a mean over everything it is given, computed in fp32.

    patches   cosine * (1 - mean cosine) + mse * mean squared error     (PH-Reg)
    pooled    the same two terms on the global output, which the paper leaves unguarded

Weights are those of `LossConfig`; a term of weight 0 is not computed.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from phreg.backbones.base import Features
from phreg.config import LossConfig


def cosine_distance(
    student: Float[Tensor, "*any dim"], target: Float[Tensor, "*any dim"]
) -> Float[Tensor, ""]:
    """One minus the mean cosine similarity; 1e-8 is added to each norm, as in the paper's code."""
    student, target = student.float(), target.float()
    norms = (student.norm(dim=-1) + 1e-8) * (target.norm(dim=-1) + 1e-8)
    return 1 - ((student * target).sum(-1) / norms).mean()


def distillation_loss(
    student: Features, target: Features, config: LossConfig
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The distillation loss and its terms by name, unweighted; terms of weight 0 are left out."""
    weighted = {
        "cosine": (config.cosine, lambda: cosine_distance(student.patches, target.patches)),
        "mse": (config.mse, lambda: F.mse_loss(student.patches.float(), target.patches.float())),
        "pooled": (config.pooled, lambda: pooled_loss(student.pooled, target.pooled)),
    }
    terms = {name: term() for name, (weight, term) in weighted.items() if weight}
    loss = sum(
        (weighted[name][0] * term for name, term in terms.items()), start=student.patches.new_zeros(())
    )
    return loss, terms


def pooled_loss(student: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Cosine distance plus squared error over the target's mean square: the same for models of any scale."""
    student, target = student.float(), target.float()
    return cosine_distance(student, target) + F.mse_loss(student, target) / target.square().mean().clamp_min(
        1e-8
    )
