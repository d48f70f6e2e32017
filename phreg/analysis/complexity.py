"""Counts what registers cost: parameters, operations and time per image (Darcet et al. 2024, figure 12).

Parameters and operations are counted, not measured: the model's structure is copied without its weights,
registers are put in, and torch's counter runs while one image without values passes through. Time is
measured on copies that share the model's weights, in turn, so that a busy machine slows all of them alike.

    model ──structure, tensors on the meta device──► n registers ──FlopCounterMode──► Cost
         └──structure, the same tensors───────────► n registers ──clock, in turn───► Latency

A multiply-add counts as two operations. Only matrix products and convolutions are counted, attention's
included; norms, activations and biases are less than a per cent of them.
"""

import copy
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from phreg.backbones.base import Backbone
from phreg.errors import PhregError
from phreg.registers import add_registers, remove_registers

log = logging.getLogger(__name__)

COUNTS = (0, 1, 2, 4, 8, 16)
"""Numbers of registers that the paper compares."""


@dataclass(frozen=True)
class Cost:
    """What a model takes with some registers.

    Attributes:
        registers: Registers that phreg adds; those that the model came with are in every row.
        parameters: Parameters of the vision tower and its head. Those of timm that keep a position row for
            CLS shed it when patched, so that the first register comes free.
        flops: Floating-point operations per image of the vision tower, its classifier left out; a
            multiply-add is two.
        parameters_added: Increase over no registers, as a share.
        flops_added: Increase over no registers, as a share.
    """

    registers: int
    parameters: int
    flops: int
    parameters_added: float
    flops_added: float

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Latency:
    """How long a model takes with some registers.

    Attributes:
        registers: Registers that phreg adds.
        low: Seconds per image, lower quartile over repeats.
        median: Seconds per image, median.
        high: Seconds per image, upper quartile.
        ratio: Median over repeats of the time over that without registers in the same repeat, which on a busy
            machine is steadier than the ratio of two medians.
        ratio_low: Its lower quartile. Where 1 lies between the quartiles, noise hides any difference.
        ratio_high: Its upper quartile.
    """

    registers: int
    low: float
    median: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return asdict(self)


def complexity(
    backbone: Backbone, registers: Sequence[int] = COUNTS, size: int | tuple[int, int] | None = None
) -> tuple[Cost, ...]:
    """Counts parameters and operations per image, by number of registers.

    Counted on the meta device, where nothing is computed and no weights are held. A model that looks at
    values on its way (Siglip2's mask) cannot run there: its count, which is the same, is taken on its own
    device from a blank image, and the log says so.

    Args:
        backbone: The model; left as it is. Registers that phreg added to it are not counted as its own.
        registers: Numbers of registers.
        size: Pixels of an image, (height, width) or one side of a square; None means the model's own size.

    Raises:
        PhregError: A number is negative, or the model does not take the size.
    """
    image = torch.zeros(1, 3, *backbone.image_size(size), dtype=backbone.dtype)
    counted = {count: _count(backbone, count, image) for count in sorted({0, *registers})}
    parameters, flops = counted[0]
    return tuple(
        Cost(count, *counted[count], counted[count][0] / parameters - 1, counted[count][1] / flops - 1)
        for count in registers
    )


def latency(
    backbone: Backbone,
    images: Float[Tensor, "batch 3 height width"],
    registers: Sequence[int] = COUNTS,
    repeats: int = 10,
) -> tuple[Latency, ...]:
    """Measures the time of a forward pass, by number of registers.

    Each repeat times every number once, beginning with another one each time; a first round is not counted.

    Args:
        backbone: The model, in eval mode; left as it is.
        images: A batch to run; how many make a batch matters, and figures are per image.
        registers: Numbers of registers.
        repeats: Times each is timed, at least two.

    Raises:
        PhregError: A number is negative, or there are fewer than two repeats.
    """
    if repeats < 2:
        raise PhregError(f"latency asked for over {repeats} repeats, which have no quartiles; use 2 or more")
    counts = sorted({0, *registers})
    images = images.to(backbone.device)
    models = {count: add_registers(_structure(backbone, lambda tensor: tensor), count) for count in counts}
    for model in models.values():
        _seconds(model, images)
    times: dict[int, list[float]] = {count: [] for count in counts}
    for repeat in range(repeats):
        start = repeat % len(counts)
        for count in counts[start:] + counts[:start]:
            times[count].append(_seconds(models[count], images) / len(images))
    found = []
    for count in registers:
        low, median, high = _quartiles(times[count])
        ratios = _quartiles([own / bare for own, bare in zip(times[count], times[0], strict=True)])
        found.append(Latency(count, low, median, high, ratios[1], ratios[0], ratios[2]))
    return tuple(found)


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _count(backbone: Backbone, registers: int, image: Tensor) -> tuple[int, int]:
    """Parameters, and operations for one image."""

    def without_values(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta")

    model = add_registers(_structure(backbone, without_values), registers)
    names = [name for named in model.roles().values() for name in named]
    parameters = sum(model.model.get_parameter(name).numel() for name in names)
    try:
        return parameters, _flops(model, image.to("meta"))
    except RuntimeError as error:
        log.info("counting %s on %s: %s", backbone.describe(), backbone.device, error)
        model = add_registers(_structure(backbone, Tensor.detach), registers)
        return parameters, _flops(model, image.to(backbone.device))


@torch.no_grad()
def _flops(model: Backbone, image: Tensor) -> int:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation that the counter does not know
    try:
        with FlopCounterMode(display=False) as counter:
            model.run(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


@torch.no_grad()
def _seconds(model: Backbone, images: Tensor) -> float:
    on_cpu = images.device.type == "cpu"
    start = time.perf_counter()
    model.run(images)
    if not on_cpu:
        torch.accelerator.synchronize(images.device)
    return time.perf_counter() - start


def _structure(backbone: Backbone, stand_in: Callable[[Tensor], Tensor]) -> Backbone:
    """Copies a model's modules and hooks, but none of its tensors, and takes phreg's registers out.

    Args:
        backbone: The model.
        stand_in: What stands for a tensor in the copy.
    """
    stand_ins: dict[int, Any] = {}
    for parameter in backbone.parameters():
        # Frozen: a raw parameter that needs a gradient, handed to a module, trips torch's counter.
        stand_ins[id(parameter)] = nn.Parameter(stand_in(parameter), requires_grad=False)
    for buffer in backbone.buffers():
        stand_ins[id(buffer)] = stand_in(buffer)
    return remove_registers(copy.deepcopy(backbone, stand_ins))
