"""The values that registers start from, before training.

    known sinks ──► the tokens that trigger them: one register per sink an image has, at most
    no sink     ──► the mean patch token, then fitted: the model with it gives the features it gave without

A register that starts from a trigger makes the sink at once, so the patches need not. A register that is free
should change nothing before the first step.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.backbones.base import Backbone, Features
from phreg.progress import track
from phreg.registers import add_registers, initial_registers, insert, remove_registers
from phreg.sinks.locate import Sinks
from phreg.sinks.units import ahead_of

BESIDE = 0.1
"""Noise on registers that start at the mean patch token, as a share of a random register."""

FITTED_ON = 32
"""Images that free registers are fitted on."""

FIT_BATCH = 4
"""Images a step of that fit."""

FIT_STEPS = 24
"""Steps of that fit."""

FIT_RATE = 0.3
"""Learning rate of that fit (Adam), as a share of the tokens' standard deviation."""


def assign_registers(num_registers: int, sinks_an_image: Sequence[int]) -> list[list[int]]:
    """Assigns clusters of sinks to registers, each once before any twice.

    Args:
        num_registers: Registers.
        sinks_an_image: Sinks that an image has of each cluster.

    Returns:
        Each register's clusters: none where there are more registers, several where there are more clusters.
    """
    turns = range(max(sinks_an_image))
    order = [cluster for turn in turns for cluster, count in enumerate(sinks_an_image) if turn < count]
    assigned: list[list[int]] = [[] for _ in range(num_registers)]
    for number, cluster in enumerate(order[: max(num_registers, len(sinks_an_image))]):
        assigned[number % num_registers].append(cluster)
    return assigned


@torch.no_grad()
def mean_patch(backbone: Backbone, batches: Iterable[Float[Tensor, "_ 3 _ _"]]) -> Float[Tensor, " width"]:
    """Returns the mean of all patch tokens that enter the blocks, over images and positions, before any norm.

    Such a token draws the attention of an average patch and adds what an average patch adds.
    """
    entered: list[Tensor] = []
    sums = []
    with ahead_of(backbone.first_block_input, lambda _module, args: entered.append(args[0])):
        for images in batches:
            backbone.run(images)
            patches = backbone.layout(images).patches(entered.pop())
            sums.append((patches.double().sum((0, 1)).cpu(), patches.shape[:2].numel()))
    return (torch.stack([total for total, _ in sums]).sum(0) / sum(count for _, count in sums)).float()


def unnoticed(
    backbone: Backbone,
    tokens: Float[Tensor, "registers width"],
    batches: Sequence[Float[Tensor, "_ 3 _ _"]],
) -> Float[Tensor, "registers width"]:
    """Moves register tokens until the model with them gives the features that it gives without.

    The tokens alone are fitted, by a few steps of Adam on the cosine distance of patch features and of pooled
    outputs. On a real DINOv2 ViT-S/14, 16 tokens then change the features less than one random token does
    (tests/sinks/test_starting.py).

    Args:
        backbone: The model, without registers; left as it was.
        tokens: Where they start.
        batches: Normalised images of one size.
    """
    few = FITTED_ON // FIT_BATCH
    images = [part for batch in batches[:few] for part in batch.split(FIT_BATCH)][:few]
    with torch.no_grad():
        references = [backbone(part) for part in images]
    insert(backbone, tokens)
    registers = backbone.require_registers()
    native = registers.shape[1] - len(tokens)  # of the class's own, which come first
    optimizer = torch.optim.Adam([registers], lr=FIT_RATE * float(tokens.std()))
    for step in track("fitting registers", range(FIT_STEPS)):
        number = step % len(images)
        loss = distance(backbone(images[number]), references[number])
        (gradient,) = torch.autograd.grad(loss, [registers])
        gradient[:, :native] = 0
        registers.grad = gradient
        optimizer.step()
    fitted = registers.detach()[0, native:].float().cpu()
    remove_registers(backbone)
    return fitted


def distance(features: Features, reference: Features) -> Float[Tensor, ""]:
    """Adds the mean cosine distances of patch features and of pooled outputs."""
    near = [
        torch.cosine_similarity(own.float(), other.float(), dim=-1).mean()
        for own, other in zip(features, reference, strict=True)
    ]
    return 2 - near[0] - near[1]


def starting_tokens(
    backbone: Backbone,
    sinks: Sinks | None,
    batches: Sequence[Float[Tensor, "_ 3 _ _"]],
    count: int,
    init: Literal["triggers", "neutral"],
    seed: int,
) -> Float[Tensor, "registers width"]:
    """Starts registers from triggers of their clusters, the most frequent first.

    A register of several clusters starts at the mean of their triggers. Those without a cluster start at
    random, or unnoticed where `init` is `neutral`.

    Args:
        backbone: The model, without registers; left as it was.
        sinks: Its sinks; None where there are none.
        batches: Normalised images of one size.
        count: Registers, 1 or more.
        init: How registers without a cluster start.
        seed: Seed of what is random.
    """
    tokens = initial_registers(count, backbone.spec.width, seed=seed)
    triggers = [] if sinks is None else sinks.triggers
    assigned = assign_registers(count, [len(own) for own in triggers]) if triggers else [[]] * count
    free = [number for number, clusters in enumerate(assigned) if not clusters]
    if free and init == "neutral":
        beside = mean_patch(backbone, batches).cpu() + BESIDE * tokens[free]
        tokens[free] = unnoticed(backbone, beside, batches)
    unused = [iter(own) for own in triggers]
    for number, clusters in enumerate(assigned):
        if clusters:
            tokens[number] = torch.stack([next(unused[cluster]) for cluster in clusters]).mean(0)
    return tokens


def add_starting_registers(
    student: Backbone,
    sinks: Sinks | None,
    batches: Sequence[Float[Tensor, "_ 3 _ _"]],
    count: int,
    init: Literal["triggers", "neutral", "randn", "trunc-normal", "zeros"],
    seed: int,
) -> None:
    """Adds registers that start as `init` says.

    Args:
        student: The model.
        sinks: Its sinks, where they are known.
        batches: Normalised images, for registers that nothing is to be noticed of.
        count: Registers.
        init: How they start. From triggers, those without a sink start at random.
        seed: Seed of what is random.
    """
    if init in ("triggers", "neutral"):
        if count:
            insert(student, starting_tokens(student, sinks, batches, count, init, seed))
    else:
        add_registers(student, count, init, seed)
