"""The loss terms, a class each: scalars over everything they are given, computed in fp32.

    cosine       1 - mean cosine of patches to the target                     (PH-Reg)
    mse          mean squared error of patches                                (PH-Reg)
    pooled       both on the global output, which the paper leaves unguarded
    relocation   sinks fire on registers and not on patches (`phreg.sinks.relocation`)

A new term is a class here, with a weight in `LossConfig`, and the methods that use it list it.
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
from phreg.sinks.units import UnitActivations


class Outputs(NamedTuple):
    """What the loss of a batch is computed from."""

    images: Float[Tensor, "batch 3 height width"]
    """What the student saw."""
    student: Features
    target: Features


class LossTerm(ABC):
    """One term of the loss.

    Attributes:
        name: What it is called in log.jsonl.
        weight: What it is multiplied by in the total; positive.
    """

    name: ClassVar[str]

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @abstractmethod
    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term, in fp32 and without its weight."""

    def capture(self) -> AbstractContextManager[Any]:
        """Hooks the student for as long as it trains, where the term needs more than its features."""
        return nullcontext()

    def warnings(self) -> list[str]:
        """Says what the last batch shows to have gone wrong."""
        return []


class Cosine(LossTerm):
    """Cosine distance of patch features."""

    name = "cosine"

    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term."""
        return cosine_distance(outputs.student.patches, outputs.target.patches)


class SquaredError(LossTerm):
    """Mean squared error of patch features."""

    name = "mse"

    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term."""
        return F.mse_loss(outputs.student.patches.float(), outputs.target.patches.float())


class Pooled(LossTerm):
    """Cosine distance plus squared error of the global output, over the target's mean square."""

    name = "pooled"

    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term."""
        return pooled_loss(outputs.student.pooled, outputs.target.pooled)


class RelocationTerm(LossTerm):
    """Asks the hidden units that cause sinks to fire on registers, and not on patches.

    Args:
        weight: Its weight.
        relocation: The units, and what is asked of them.
    """

    name = "relocation"

    def __init__(self, weight: float, relocation: Relocation) -> None:
        super().__init__(weight)
        self.relocation = relocation
        self._captured: dict[int, UnitActivations] = {}

    def __call__(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Computes the term."""
        return self.relocation.loss(self._captured, outputs.images)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Reads the units as the student runs."""
        with self.relocation.capture() as self._captured:
            yield

    def warnings(self) -> list[str]:
        """Names units that fire nowhere any more."""
        silenced = self.relocation.silenced(self._captured)
        if not silenced:
            return []
        return [
            f"no register took over hidden units {', '.join(silenced)}, which cause sinks: these were "
            "silenced rather than moved; train longer, or with a larger --loss.relocation"
        ]


def distillation_terms(config: LossConfig) -> list[LossTerm]:
    """Lists the terms between student and target; those of weight 0 are left out."""
    terms = [Cosine(config.cosine), SquaredError(config.mse), Pooled(config.pooled)]
    return [term for term in terms if term.weight]


def total_loss(
    terms: Sequence[LossTerm], outputs: Outputs
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Adds up terms by their weights; returns the total, and each term without its weight by name."""
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


def pooled_loss(student: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Cosine distance plus squared error over the target's mean square: the same for models of any scale."""
    student, target = student.float(), target.float()
    return cosine_distance(student, target) + F.mse_loss(student, target) / target.square().mean().clamp_min(
        1e-8
    )
