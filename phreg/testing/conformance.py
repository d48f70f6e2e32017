"""Runs every check on one model."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from phreg.backbones.resolve import adapt
from phreg.testing.laws import LAWS, check_compile, check_other_size
from phreg.testing.subject import DenseReader, Subject


def check_backbone(
    model: nn.Module,
    *,
    size: int | tuple[int, int] | None = None,
    num_registers: int = 4,
    dense: DenseReader | None = None,
    compile: bool = False,
) -> None:
    """Checks that phreg handles a model as its laws say.

    Args:
        model: A model without phreg registers; it is not changed.
        size: Pixels to test at, a side or (height, width); None means the model's own.
        num_registers: Registers to add.
        dense: How the library itself gives dense features (batch, rows, cols, dim) after the final norm, from
            the model and images; None skips that comparison.
        compile: Also check torch.compile and torch.export, which take seconds to minutes.

    Raises:
        AssertionError: A law is broken; the message says which and how.
        UnsupportedModelError: phreg does not handle the model at all.
    """
    model = copy.deepcopy(model).eval()
    backbone = adapt(model)
    height, width = (size, size) if isinstance(size, int) else size or backbone.spec.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, height, width, generator=generator).to(backbone.device)
    subject = Subject(model, images, num_registers, dense)
    checks: list[Callable[[Subject], None]] = list(LAWS)
    if backbone.spec.any_size:
        checks.append(check_other_size)
    if compile:
        checks.append(check_compile)
    for check in checks:
        try:
            check(subject)
        except RuntimeError as error:
            raise AssertionError(f"{check.__name__} fails on {backbone.describe()}: {error}") from error
