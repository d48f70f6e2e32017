"""What is trained: a student, its frozen teacher, and the loss terms between them.

    images ──teacher──► target ──┐
       └─────student──► features ┴──terms──► total, each term by name

The loop asks a task for targets and losses, and knows neither methods nor read-outs.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone, Features
from phreg.backbones.readout import use_readout
from phreg.config import TargetConfig
from phreg.data.crops import center_crop
from phreg.teacher import Teacher
from phreg.training.losses import LossTerm, Outputs, total_loss


class RetrofitTask:
    """A student with registers that learns from the frozen model it was made from.

    Args:
        student: The patched model, on its device.
        teacher: The frozen original, averaged over views.
        terms: The terms of the loss.
        config: Which features of both models are compared, and their read-outs.
    """

    def __init__(
        self,
        student: Backbone,
        teacher: Teacher,
        terms: Sequence[LossTerm],
        config: TargetConfig,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.terms = terms
        self.config = config

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sets the read-outs and captures what the terms need. Afterwards both read-outs are as before."""
        with ExitStack() as stack:
            stack.enter_context(use_readout(self.teacher.backbone, self.config.teacher_readout))
            stack.enter_context(use_readout(self.student, self.config.student_readout))
            for term in self.terms:
                stack.enter_context(term.capture())
            yield

    def target(
        self,
        images: Float[Tensor, "batch 3 height width"],
        generator: torch.Generator,
        margin: tuple[int, int] = (0, 0),
    ) -> Features:
        """Makes the target of images of any size, with their context margin. The generator decides the views.

        Args:
            images: Normalised images.
            generator: A CPU generator.
            margin: Rows and columns of their context, in pixels on each side.
        """
        return self.teacher(images, generator, margin)

    def loss(
        self,
        model: nn.Module,
        images: Float[Tensor, "batch 3 height width"],
        target: Features,
        margin: tuple[int, int] = (0, 0),
        batch_target: Features | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Computes the loss of a batch, or of a part of it.

        Args:
            model: The student, as it was prepared for training (autocast, several processes).
            images: Normalised images with their context margin.
            target: The target of these images.
            margin: Rows and columns of their context, in pixels on each side.
            batch_target: The target of the whole batch, where these images are a part of it.

        Returns:
            The total, and each term without its weight by name, all fp32.
        """
        seen, features = self.features(model, images, margin)
        return total_loss(self.terms, Outputs(seen, features, target, batch_target))

    def features(
        self,
        model: nn.Module,
        images: Float[Tensor, "batch 3 height width"],
        margin: tuple[int, int] = (0, 0),
    ) -> tuple[Float[Tensor, "batch 3 _ _"], Features]:
        """Reads the student's features of images that come with their context.

        Returns:
            The images without their context, and their features.
        """
        seen = center_crop(images, margin)
        return seen, model(seen, self.config.layer, self.config.norm)

    def probe(self, size: tuple[int, int]) -> Float[Tensor, ""]:
        """Computes the loss of a blank image against ones. It reaches every weight that a run can reach.

        Args:
            size: Height and width of the run's images.
        """
        blank = torch.zeros(1, 3, *size, device=self.student.device, dtype=self.student.dtype)
        features = self.student(blank, self.config.layer, self.config.norm)
        # Different from any features, so that no gradient is zero by chance.
        unlike = Features(torch.ones_like(features.patches), torch.ones_like(features.pooled))
        return total_loss(self.terms, Outputs(blank, features, unlike))[0]

    def forget(self) -> None:
        """Drops what terms captured in a pass that did not end, and with it what that pass computed."""
        for term in self.terms:
            term.forget()

    def warnings(self) -> list[str]:
        """Lists problems that the last batch shows."""
        return [warning for term in self.terms for warning in term.warnings()]
