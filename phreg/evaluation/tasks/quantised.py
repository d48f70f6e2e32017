"""Quantised: what classification or zero-shot segmentation loses when the linear layers compute in 8 bits.

Measured twice, as the model is and with int8 dynamic quantisation: weights in 255 steps per output channel,
inputs in 256 steps between the least and the greatest number of each image's tokens. A token of huge norm, as
artifacts are, leaves few of these steps to all others, so that a repaired model should lose less.

    input ──256 steps an image──► ┐
    weight ──255 steps a channel─►┴─ linear, bias ──► output

Numbers are rounded to those steps and multiplied in fp32, which gives what integer kernels give but for the
order of sums, on any device; it measures accuracy, and says nothing of speed. Where a library joins queries,
keys and values in one projection, a read-out other than plain takes its rounded weight apart, and what goes
in stays as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, fake_quantize_per_channel_affine, nn

from phreg.config import Config
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.evaluation.tasks import classification, zero_shot_segmentation
from phreg.evaluation.tasks.classification import Settings as Classification
from phreg.evaluation.tasks.zero_shot_segmentation import Settings as ZeroShotSegmentation

DATA = "those of the task that is measured"
TREE = f"""As classification, or with --set measured=zero-shot-segmentation as that:

{classification.TREE}

{zero_shot_segmentation.TREE}"""
METRICS = (
    *(MetricSpec(f"int8_{name}", about=f"{name} of the model in int8") for name in ("top1", "miou")),
    *(
        MetricSpec(f"lost_{name}", better="lower", about=f"what int8 loses of {name}")
        for name in ("top1", "miou")
    ),
    *classification.METRICS,
    *zero_shot_segmentation.METRICS,
)


class Settings(Config):
    """A task before and after int8 dynamic quantisation."""

    measured: Literal["classification", "zero-shot-segmentation"] = "classification"
    """The task that is measured twice; it says what data there have to be."""
    classification: Classification = Classification()
    """Settings of the one task."""
    zero_shot_segmentation: ZeroShotSegmentation = ZeroShotSegmentation()
    """Settings of the other."""


def is_stochastic(data: str, settings: Settings) -> bool:
    """As classification does."""
    return classification.is_stochastic(data, settings.classification)


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Measures the model as it is, and quantised.

    Returns:
        Of the task's headline, `int8_top1`, `top1` and the difference, `lost_top1`, or the same of `miou`;
        detail has all figures, before and after.

    Raises:
        PhregError: The task's data or the model do not fit, as in the task itself.
    """

    def measure(reader: FeatureReader) -> Metrics:
        if settings.measured == "classification":
            return classification.run(reader, data, settings.classification, seed)
        return zero_shot_segmentation.run(reader, data, settings.zero_shot_segmentation, seed)

    before = measure(reader)
    with int8(reader.backbone):
        # Without the baseline, which may be the same model: its artifacts are those it has in full precision.
        after = measure(replace(reader, identity=f"{reader.identity}-int8", reference=None))
    name = next(iter(before.figures))
    full, rounded = before.figures[name], after.figures[name]
    figures = {f"int8_{name}": rounded, name: full, f"lost_{name}": full - rounded}
    detail = {"full": before.figures, "int8": after.figures}
    counts = dict.fromkeys(figures, before.counts[name]) if name in before.counts else {}
    resampled: dict[str, Sequence[float]] = {}
    if name in before.resampled:
        full, rounded = before.resampled[name], after.resampled[name]
        lost = [more - less for more, less in zip(full, rounded, strict=True)]
        resampled = {f"int8_{name}": rounded, name: full, f"lost_{name}": lost}
    return Metrics(figures, detail, before.notes, (name,), counts, before.pictures, resampled)


@contextmanager
def int8(model: nn.Module) -> Iterator[None]:
    """Quantises every linear layer of a model, and restores it to the bit.

    What torch's fused attention hands to its output projection stays as it is; that projection's weight does
    not.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.MultiheadAttention))]
    weights = {
        weight
        for layer in layers
        for weight in layer.parameters(recurse=False)
        if weight.dim() == 2  # biases are added in full precision
    }
    originals = {weight: weight.data for weight in weights}
    hooks = [layer.register_forward_pre_hook(_round_inputs, with_kwargs=True) for layer in layers]
    try:
        for weight in weights:
            weight.data = round_weight(weight.data)
        yield
    finally:
        for weight, original in originals.items():
            weight.data = original
        for hook in hooks:
            hook.remove()


def round_weight(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Rounds each row to 255 steps, symmetric about 0."""
    scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -127, 127).to(weight.dtype)


def round_input(inputs: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Rounds each image's numbers to 256 steps, which reach from the least to the greatest and hold 0."""
    values = inputs.float()
    flat = values.flatten(1)
    low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round().clamp(0, 255).int()
    return fake_quantize_per_channel_affine(values, scale, zero, 0, 0, 255).to(inputs.dtype)


def _round_inputs(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rounds what goes into a layer; masks, which may lie beside it, are no input of the product."""
    named = {key: round_input(value) if key in INPUTS else value for key, value in kwargs.items()}
    return tuple(round_input(value) if place < 3 else value for place, value in enumerate(args)), named


INPUTS = frozenset({"input", "query", "key", "value"})
"""Names of the inputs of linear layers and of attention, whose first three arguments they are."""
