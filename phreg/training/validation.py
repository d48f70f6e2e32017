"""Measures the student on held-out images as it trains, and keeps the best state.

    held-out images ──┬─ student ──► agreement with the reference, drift of the pooled output
    references ───────┘                       │
                                              └─► best so far? its weights are copied

The references are the original averaged over many views, made once, before training. The original itself is
the first state: where no later one agrees better and leaves the pooled output alone, it is the result.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone, Readout
from phreg.backbones.readout import use_readout
from phreg.config import TargetConfig
from phreg.evaluation.before_after import HeldOut
from phreg.evaluation.metrics.agreement import Agreement, AgreementMeter, drift
from phreg.processes import in_shares
from phreg.training.sharding import is_sharded, outer_weights

logger = logging.getLogger(__name__)

TURNED = 0.005
"""Agreement this far below the best means that training has turned."""

PATIENCE = 4
"""Measurements in a row at which training has turned, after which it ends."""

WRECKING = 0.02
"""Agreement this far below the original's means that training is wrecking the model."""


class Measurement(NamedTuple):
    """The student at a step, on held-out images.

    Attributes:
        agreement: Mean cosine of patch features to the references.
        worst_percent: The cosine that 99 % of the patches reach.
            Of images of several sizes, both are taken for each size first; then images count alike.
        pooled: Mean cosine of the pooled output to the original's.
    """

    agreement: float
    worst_percent: float
    pooled: float


class Validator:
    """Measures models on held-out images, in fp32 whatever precision they train in, unless under autocast.

    Each process reads a share of the images, and all get the figures of all of them.

    Args:
        original: The model as it was.
        held_out: The images.
        target: Which features are compared, in which read-outs.
    """

    def __init__(self, original: Backbone, held_out: HeldOut, target: TargetConfig) -> None:
        self.held_out, self.target = held_out, target
        self.measure_original(original)

    def measure_original(self, original: Backbone) -> None:
        """Measures the model as it was, anew where models are computed in another precision since."""
        mean, worst_percent, self._pooled = self._read(original, self.target.teacher_readout)
        self.original = Measurement(mean, worst_percent, pooled=1.0)

    def __call__(self, student: Backbone) -> Measurement:
        """Measures the student; its read-out is left as it was."""
        mean, worst_percent, pooled = self._read(student, self.target.student_readout)
        return Measurement(mean, worst_percent, drift(pooled, self._pooled).mean)

    @torch.no_grad()
    def _read(self, backbone: Backbone, readout: Readout) -> tuple[float, float, Float[Tensor, "images dim"]]:
        """Returns a model's agreement with the references, mean and worst, and its plain pooled output."""
        meters: dict[tuple[int, int], AgreementMeter] = {}
        read = partial(self._read_batch, backbone, readout)
        # A forward of sharded weights is collective, so each process makes as many.
        parts = in_shares(len(self.held_out.images), read, even=is_sharded(backbone))
        for reference, (meter, _) in zip(self.held_out.references, parts, strict=True):
            _, rows, cols, _ = reference.shape
            meters.setdefault((rows, cols), AgreementMeter()).merge(meter)
        pooled = [pooled for _, pooled in parts]
        return *_over_sizes({grid: meter.compute() for grid, meter in meters.items()}), torch.cat(pooled)

    def _read_batch(
        self, backbone: Backbone, readout: Readout, number: int
    ) -> tuple[AgreementMeter, Float[Tensor, "images dim"]]:
        """Reads one batch: its agreement, and its pooled output on the host."""
        images, meter = self.held_out.images[number], AgreementMeter()
        with use_readout(backbone, readout):
            # Not by calling the model: accelerate wraps the call of one that trains in autocast.
            run = backbone if is_sharded(backbone) else partial(Backbone.forward, backbone)
            features = run(images, self.target.layer, self.target.norm)
        meter.update(features.patches, self.held_out.references[number])
        if readout != "plain":  # whose pooled output means nothing
            with use_readout(backbone, "plain"), outer_weights(backbone):
                features = features._replace(pooled=backbone.run(images))
        return meter, features.pooled.float().cpu()


def _over_sizes(measured: Mapping[tuple[int, int], Agreement]) -> tuple[float, float]:
    """Averages agreement at several grids (rows, columns), mean and worst, so that images count alike."""
    images = {(rows, cols): found.patches // (rows * cols) for (rows, cols), found in measured.items()}
    shares = {grid: count / sum(images.values()) for grid, count in images.items()}
    return (
        sum(shares[grid] * found.mean for grid, found in measured.items()),
        sum(shares[grid] * found.worst_percent for grid, found in measured.items()),
    )


class BestState:
    """The weights that measured best, and whether training has turned.

    Its figures are tensors, so that a checkpoint holds them as it holds weights.

    Args:
        parameters: The weights that train, by name.
        original: The original's figures, which a state has to beat.
        min_pooled: Least cosine of the pooled output to the original's that a state may have.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], original: Measurement, min_pooled: float
    ) -> None:
        self.parameters, self.min_pooled = parameters, min_pooled
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        # Step and agreement of the best state, and measurements in a row since training turned.
        self.figures = torch.tensor([0.0, original.agreement, 0.0], dtype=torch.float64)

    @property
    def step(self) -> int:
        """Step after which the best state was reached; 0 where that is the original."""
        return int(self.figures[0])

    @property
    def agreement(self) -> float:
        """Agreement of the best state."""
        return float(self.figures[1])

    @property
    def turned(self) -> bool:
        """Whether training has been below the best state for long, so that it should end."""
        return int(self.figures[2]) >= PATIENCE

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold, restored in place."""
        return {"best.figures": self.figures} | {
            f"best.{name}": value for name, value in self.weights.items()
        }

    @torch.no_grad()
    def update(self, step: int, measured: Measurement) -> None:
        """Takes a measurement of the current weights in."""
        if measured.agreement > self.agreement and measured.pooled >= self.min_pooled:
            for name, parameter in self.parameters.items():
                self.weights[name].copy_(parameter)
            self.figures[0], self.figures[1] = step, measured.agreement
        turned = not measured.agreement >= self.agreement - TURNED
        self.figures[2] = self.figures[2] + 1 if turned else 0

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best weights in place; of the original there are none to put."""
        if self.step:
            for name, parameter in self.parameters.items():
                parameter.copy_(self.weights[name])


def warn_wrecked(step: int, measured: Measurement, original: Measurement) -> None:
    """Says so where training makes the model much worse than it was."""
    if not measured.agreement >= original.agreement - WRECKING:
        logger.warning(
            "after %d steps the model agrees less with its own moved views than before training: %.4f, was "
            "%.4f; this recipe is damaging it: stop, and lower optim.lr or set optim.trust_region",
            step, measured.agreement, original.agreement,
        )  # fmt: skip
