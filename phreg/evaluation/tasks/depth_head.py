"""The head of linear depth, and the losses that it learns by.

    [patch, CLS] ──linear──► scores, made finer ──relu + 0.1, over their sum──► shares ──· bins──► metres

DINOv2's head (Oquab et al. 2024, arXiv 2304.07193, section 7.4) with the bins of AdaBins (arXiv 2011.14141),
the scale-invariant loss of BTS (arXiv 1907.10326) and the gradient matching of MegaDepth (arXiv 1804.00607).
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from phreg.seeding import keyed_generator

FLOOR = 0.1
"""Added to each score, so that none of the shares is 0."""

SCALES = (1, 2, 4, 8)
"""Steps in pixels at which gradients are matched."""


class DepthHead(nn.Module):
    """Patch features and CLS to depths.

    Args:
        dim: Channels of both together.
        depths: The bins, in metres.
        seed: Seed of the first weights.
        finer: Scores are resampled so many times finer than patches, before they become depths.
        batch_norm: Whether features are normalised first, by the statistics of batches.
    """

    def __init__(
        self, dim: int, depths: Float[Tensor, " bins"], seed: int, *, finer: int = 4, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.finer = finer
        self.norm = nn.BatchNorm2d(dim) if batch_norm else nn.Identity()
        self.score = nn.Conv2d(dim, len(depths), 1)
        weight, bias = self.score.parameters()
        nn.init.normal_(weight, std=0.01, generator=keyed_generator("head", seed))
        nn.init.zeros_(bias)
        self.depths = nn.Buffer(depths)

    def forward(
        self, features: Float[Tensor, "batch dim rows cols"]
    ) -> Float[Tensor, "batch 1 fine_rows fine_cols"]:
        """Computes depths in metres, `finer` times as fine as the features."""
        # A linear map and resampling commute; this way round, fewer channels are resampled.
        scores = interpolate(
            self.score(self.norm(features)), scale_factor=self.finer, mode="bilinear", align_corners=False
        )
        shares = scores.relu() + FLOOR
        return (shares * self.depths.view(-1, 1, 1)).sum(1, keepdim=True) / shares.sum(1, keepdim=True)


def scale_loss(
    errors: Float[Tensor, "batch 1 height width"],
    counted: Bool[Tensor, "batch 1 height width"],
    *,
    mean_only: bool = False,
) -> Float[Tensor, ""]:
    """Computes the scale-invariant loss: the root of the variance and 0.15 times the squared mean.

    Args:
        errors: Log of predicted less log of true depth.
        counted: Pixels that count; the loss is 0 where none do.
        mean_only: Leave out the variance, so that the scale is found first.
    """
    valid = errors[counted]
    if len(valid) < 2:
        return errors.sum() * 0
    square = 0.15 * valid.mean().square() + (0 if mean_only else valid.var())
    return square.clamp(min=1e-12).sqrt()  # whose slope at 0 is infinite


def gradient_loss(
    errors: Float[Tensor, "batch 1 height width"], counted: Bool[Tensor, "batch 1 height width"]
) -> Float[Tensor, ""]:
    """Computes how steep log errors are, summed over `SCALES`: edges of depth should be edges of the answer.

    Args:
        errors: Log of predicted less log of true depth.
        counted: Pixels that count.
    """
    total = errors.new_zeros(())
    for step in SCALES:
        error, valid = errors[..., ::step, ::step], counted[..., ::step, ::step]
        for axis in (-2, -1):
            both = valid.narrow(axis, 1, valid.shape[axis] - 1) & valid.narrow(axis, 0, valid.shape[axis] - 1)
            total = total + (error.diff(dim=axis).abs() * both).sum() / valid.sum().clamp(min=1)
    return total
