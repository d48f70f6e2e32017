"""The loss terms, one class each: scalars over a batch, computed in fp32.

    cosine       1 - mean cosine of patches to the target                     (PH-Reg)
    mse          mean squared error of patches                                (PH-Reg)
    relative_mse the same over the target's mean square: a model's scale does not decide
    pooled       both on the global output, which the paper does not guard
    relocation   registers hold what sinks hold, and patches none of it (`phreg.sinks.relocation`)

To add a term, write a class here, add its weight to `LossConfig`, and list it in the methods that use it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from phreg.backbones.base import Features
from phreg.config import LossConfig
from phreg.sinks.relocation import Relocation


class Outputs(NamedTuple):
    """The inputs of the loss of a batch."""

    images: Float[Tensor, "batch 3 height width"]
    """What the student saw."""
    student: Features
    target: Features
    batch_target: Features | None = None
    """The target of the whole batch, where the images are a part of it; None where they are all of it."""

    @property
    def scale(self) -> Features:
        """The target whose scale the errors are divided by: that of the whole batch."""
        return self.target if self.batch_target is None else self.batch_target


class LossTerm(ABC):
    """One term of the loss.

    Attributes:
        name: Its name in log.jsonl.
        weight: Its factor in the total; positive.
        is_mean: Whether the term of a batch is the mean of those of its images, each taken with the batch's
            `Outputs.scale`. Only then may a batch be taken in parts, where memory does not hold it at once.
    """

    name: ClassVar[str]
    is_mean: ClassVar[bool] = False

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @abstractmethod
    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term, in fp32 and without its weight."""

    def capture(self) -> AbstractContextManager[Any]:
        """Hooks the student while it trains, if the term needs more than its features."""
        return nullcontext()

    def forget(self) -> None:
        """Drops what was captured in a pass that did not end, as memory ran out."""
        return

    def warnings(self) -> list[str]:
        """Lists problems that the last batch shows."""
        return []


class Cosine(LossTerm):
    """Cosine distance of patch features."""

    name = "cosine"
    is_mean = True

    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term."""
        return cosine_distance(outputs.student.patches, outputs.target.patches)


class SquaredError(LossTerm):
    """Mean squared error of patch features."""

    name = "mse"
    is_mean = True

    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term."""
        return F.mse_loss(outputs.student.patches.float(), outputs.target.patches.float())


class RelativeSquaredError(LossTerm):
    """Mean squared error of patch features, divided by the target's mean square."""

    name = "relative_mse"
    is_mean = True

    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term."""
        return relative_squared_error(outputs.student.patches, outputs.target.patches, outputs.scale.patches)


class Pooled(LossTerm):
    """Cosine distance of the global output, plus its squared error divided by the target's mean square."""

    name = "pooled"
    is_mean = True

    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term."""
        return pooled_loss(outputs.student.pooled, outputs.target.pooled, outputs.scale.pooled)


class RelocationTerm(LossTerm):
    """Makes registers hold what sinks hold, and patches hold none of it.

    Args:
        weight: Its weight.
        relocation: The loss of these sinks.
    """

    name = "relocation"
    is_mean = True

    def __init__(self, weight: float, relocation: Relocation) -> None:
        super().__init__(weight)
        self.relocation = relocation
        self._captured: dict[int, Tensor] = {}

    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term."""
        return self.relocation.loss(self._captured, outputs.images)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Reads the residual stream while the student runs."""
        with self.relocation.capture() as self._captured:
            yield

    def forget(self) -> None:
        """Drops what was read in a pass that did not end."""
        self._captured.clear()

    def warnings(self) -> list[str]:
        """Names clusters of sinks that are nowhere any more."""
        lost = self.relocation.lost(self._captured)
        if not lost:
            return []
        which = "the sinks" if lost == [0] else f"sinks of cluster {', '.join(map(str, lost))}"
        return [
            f"no register holds what {which} held: they were silenced rather than moved; train longer, or "
            "with a larger --loss.relocation"
        ]


def distillation_terms(config: LossConfig) -> list[LossTerm]:
    """Lists the terms between student and target, without those of weight 0."""
    terms = [
        Cosine(config.cosine),
        SquaredError(config.mse),
        RelativeSquaredError(config.relative_mse),
        Pooled(config.pooled),
    ]
    return [term for term in terms if term.weight]


def total_loss(
    terms: Sequence[LossTerm], outputs: Outputs
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Adds up weighted terms. Returns the total, and each term without its weight, by name."""
    values = {term.name: term(outputs) for term in terms}
    weighted = (term.weight * values[term.name] for term in terms)
    return sum(weighted, start=torch.zeros((), device=outputs.student.patches.device)), values


def cosine_distance(
    student: Float[Tensor, "*any dim"], target: Float[Tensor, "*any dim"]
) -> Float[Tensor, ""]:
    """One minus the mean cosine similarity; 1e-8 is added to each norm, as in the paper's code."""
    student, target = student.float(), target.float()
    norms = (student.norm(dim=-1) + 1e-8) * (target.norm(dim=-1) + 1e-8)
    return 1 - ((student * target).sum(-1) / norms).mean()


def pooled_loss(
    student: Float[Tensor, "batch dim"],
    target: Float[Tensor, "batch dim"],
    scale: Float[Tensor, "images dim"] | None = None,
) -> Float[Tensor, ""]:
    """Cosine distance plus squared error over the target's mean square. It ignores a model's scale.

    Args:
        student: Pooled outputs.
        target: Their targets.
        scale: What the mean square is of; None means the target.
    """
    return cosine_distance(student, target) + relative_squared_error(student, target, scale)


def relative_squared_error(
    student: Float[Tensor, "*any dim"],
    target: Float[Tensor, "*any dim"],
    scale: Float[Tensor, "... dim"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error over the mean square of the target, or of `scale` where it is given."""
    student, target = student.float(), target.float()
    square = (target if scale is None else scale.float()).square().mean()
    return F.mse_loss(student, target) / square.clamp_min(1e-8)
