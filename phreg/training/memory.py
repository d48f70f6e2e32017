"""How a training step fits into memory: blocks are computed twice, and a batch is taken in parts.

    batch ──out of memory──► blocks computed twice ──out of memory──► halves ──out of memory──► quarters …

Neither changes the gradient. A block that is computed twice keeps its input alone in the forward pass, and is
run again in the backward pass (activation checkpointing; Chen et al. 2016, arXiv 1604.06174). The loss of a
part counts by its share of the images, and errors are divided by the scale of the whole batch's target.
Only an out-of-memory error of a GPU is seen: on a CPU the system ends the process.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from phreg.backbones.base import Backbone, Features
from phreg.config import DistillConfig
from phreg.errors import PhregError
from phreg.training.task import RetrofitTask

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Sums = dict[str, Tensor]
"""The loss and its terms, by name."""


class CheckpointedBlocks:
    """Activation checkpointing of a backbone's blocks, to be turned on and off.

    The forward of each block is replaced. So hooks around a block (registers, taps) stay outside and run
    once, whatever the library. Hooks inside a block run again in the backward pass.

    Args:
        backbone: The model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._blocks = backbone.blocks
        self._before: list[Any] = []

    @property
    def on(self) -> bool:
        """Whether blocks are checkpointed."""
        return bool(self._before)

    def turn_on(self) -> None:
        """Checkpoints the blocks from the next forward pass on."""
        if not self.on:
            self._before = [vars(block).get("forward") for block in self._blocks]
            for block in self._blocks:
                block.forward = _computed_twice(block)

    def turn_off(self) -> None:
        """Gives the blocks their own forward back."""
        for block, forward in zip(self._blocks, self._before, strict=False):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
        self._before = []


def _computed_twice(block: nn.Module) -> Callable[..., Any]:
    """Makes the forward of a block that keeps nothing but its input."""
    forward = block.forward
    # PEFT changes the weights of fused attention during its forward, which must therefore run to its end.
    fused = any(isinstance(module, nn.MultiheadAttention) for module in block.modules())

    @wraps(forward)
    def run(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        with set_checkpoint_early_stop(not fused):
            return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


class StepMemory:
    """Runs the forward and backward passes of a batch so that they fit, and keeps what it took.

    Args:
        task: What is trained.
        config: The run's settings.
        processes: Processes that train together. Each could run out of memory alone, and the others would
            wait for its gradients. So several find out before the first step what fits all of them.

    Attributes:
        micro_batch: Images per forward and backward pass.
        checkpointed: Whether blocks are computed twice.

    Raises:
        PhregError: The settings ask for parts of a batch, and a term of the loss needs it whole.
    """

    def __init__(self, task: RetrofitTask, config: DistillConfig, processes: int = 1) -> None:
        self.task, self.processes = task, processes
        self.batch_size = config.batch_size
        self.micro_batch = min(config.optim.micro_batch or config.batch_size, config.batch_size)
        self._blocks = CheckpointedBlocks(task.student)
        self._automatic = config.checkpoint_activations == "auto"
        self.checkpointed = config.checkpoint_activations is True
        whole = [term.name for term in task.terms if not term.is_mean]
        self._divisible = not whole
        if whole and self.micro_batch < self.batch_size:
            raise PhregError(
                f"optim.micro_batch = {self.micro_batch} takes a batch of {self.batch_size} images in parts, "
                f"and loss terms {', '.join(whole)} need it whole (LossTerm.is_mean); leave "
                "optim.micro_batch unset, or lower batch_size"
            )

    @property
    def use(self) -> dict[str, Any]:
        """What the log and the record of a run say: `micro_batch` and `checkpointed`, where they apply."""
        return {
            **({"micro_batch": self.micro_batch} if self.micro_batch < self.batch_size else {}),
            **({"checkpointed": True} if self.checkpointed else {}),
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Lets blocks be computed twice inside: from the start if configured, or from when memory ends."""
        if self.checkpointed:
            self._blocks.turn_on()
        try:
            yield
        finally:
            self._blocks.turn_off()

    def backward(
        self,
        model: nn.Module,
        images: Tensor,
        target: Features,
        margin: tuple[int, int],
        *,
        divisor: int = 1,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Sums | None:
        """Adds the gradient of a batch's loss to that of the weights.

        Args:
            model: The student, as it was prepared for training.
            images: Normalised images with their context margin.
            target: Their target.
            margin: Rows and columns of their context, in pixels on each side.
            divisor: What the gradient is divided by.
            backward: Runs the backward pass of a loss.
            alone: Makes the context of all parts but the last: there processes exchange no gradients.

        Returns:
            The loss and its terms by name, detached. None where memory ran out: gradients are then of no
            use, and the next try takes less memory.

        Raises:
            PhregError: Memory ran out, and nothing can be done about it.
        """
        try:
            return self._backward(model, images, target, margin, divisor, backward, alone)
        except torch.OutOfMemoryError as error:
            found = str(error)
        # Only here: until its handler has ended, the error holds all that the pass had computed.
        self.task.forget()
        self._take_less(found)
        return None

    def _backward(
        self,
        model: nn.Module,
        images: Tensor,
        target: Features,
        margin: tuple[int, int],
        divisor: int,
        backward: Callable[[Tensor], None],
        alone: Callable[[], AbstractContextManager[Any]],
    ) -> Sums:
        parts = list(zip(*(tensor.split(self.micro_batch) for tensor in (images, *target)), strict=True))
        sums: Sums = {}
        for number, (part, *own) in enumerate(parts, start=1):
            of_batch, whole = len(part) / len(images), target if len(parts) > 1 else None
            with alone() if number < len(parts) else nullcontext():
                loss, terms = self.task.loss(model, part, Features(*own), margin, whole)
                backward(loss * of_batch / divisor)
            made = {name: value.detach() * of_batch for name, value in {"loss": loss, **terms}.items()}
            sums = {name: sums[name] + value for name, value in made.items()} if sums else made
            del loss, terms
        return sums

    def rehearse(self, model: nn.Module, size: tuple[int, int], accelerator: "Accelerator") -> None:
        """Finds what fits on every process, with blank images; the weights' gradients are dropped.

        Args:
            model: The student, as it was prepared for training.
            size: Height and width of the run's largest images.
            accelerator: The processes.

        Raises:
            PhregError: Nothing fits.
        """
        student = self.task.student
        blank = torch.zeros(self.batch_size, 3, *size, device=student.device, dtype=student.dtype)
        with torch.no_grad():
            one = model(blank[:1], self.task.config.layer, self.task.config.norm)
        target = Features(
            *(torch.ones_like(made).expand(len(blank), *made.shape[1:]).float() for made in one)
        )
        processes, self.processes = self.processes, 1  # nothing is exchanged here
        while True:
            state = self.checkpointed, self.micro_batch
            with accelerator.no_sync(model):
                fitted = self.backward(model, blank, target, (0, 0), backward=accelerator.backward)
            student.zero_grad()
            short = torch.tensor(float(fitted is None), device=student.device)
            if not cast(Tensor, accelerator.reduce(short, "sum")):
                break
            if state == (self.checkpointed, self.micro_batch):  # another process ran out of memory
                self._take_less("another process ran out of memory")
        self.processes = processes

    def _take_less(self, found: str) -> None:
        """Takes the next measure after an out-of-memory error.

        Raises:
            PhregError: There is none left.
        """
        torch.cuda.empty_cache()
        divisible = self._divisible and self.micro_batch > 1
        if self.processes == 1 and self._automatic and not self.checkpointed:
            self.checkpointed = True
            self._blocks.turn_on()
            logger.warning(
                "a training step ran out of memory; going on with activation checkpointing "
                "(checkpoint_activations): the gradients are the same, the student takes about a third longer"
            )
        elif self.processes == 1 and divisible:
            self.micro_batch //= 2
            logger.warning(
                "a training step ran out of memory; going on with %d of %d images at a time "
                "(optim.micro_batch): the gradients are the same", self.micro_batch, self.batch_size,
            )  # fmt: skip
        else:
            measures = [
                "set checkpoint_activations = true" if not self.checkpointed else "",
                f"set optim.micro_batch = {self.micro_batch // 2}" if divisible else "",
                "train fewer weights (unlock.lora, unlock.roles)",
                "use --precision bf16, and --frozen-dtype bf16",
                "lower --size" if divisible or self.micro_batch == 1 else "lower --batch-size or --size",
            ]
            raise PhregError(
                f"a training step of {self.task.student.describe()} with {self.micro_batch} images at a time "
                f"does not fit into the memory of {self.task.student.device}: {found}; "
                f"{', or '.join(filter(None, measures))}"
            )
