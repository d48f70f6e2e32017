"""Asks with a linear probe what single tokens hold of the whole image: its class.

Artifacts tell more of it than ordinary patches do (Darcet et al. 2024, arXiv 2309.16588, section 2, table 1).

    batches ──backbone──┬─► outliers of block `focus`
                        └─► tokens of block `layer` ─► final norm ─► one of each image ─► class of the image

The probe is measured on other images than it is trained on. Tokens are read as `phreg.analysis.probes` reads
them.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from phreg.analysis.linear import fit_softmax
from phreg.analysis.norms import NormReport
from phreg.analysis.probes import held_count, probed_layer, read_tokens
from phreg.backbones.base import Backbone
from phreg.deprecated import current_attribute
from phreg.errors import DataError
from phreg.seeding import keyed_generator

ORDINARY, OUTLIER = "ordinary patch", "outlier patch"
"""What `GlobalProbe` calls the two kinds of patch token."""


@dataclass(frozen=True)
class TokenAccuracy:
    """How well one token tells the class of its image.

    Attributes:
        token: Which one: `ordinary patch`, `outlier patch`, or as `Backbone.special_tokens` names it.
        images: Images that have one, trained and tested on.
        mean: Top-1 accuracy on held-out images, mean over seeds.
        std: Standard deviation over seeds (n - 1); None of a single one.
        values: The accuracy of each seed.
    """

    token: str
    images: int
    mean: float
    std: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, token: str, images: int, values: Sequence[float]) -> "TokenAccuracy":
        """Sums up the accuracies of several seeds."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(token, images, statistics.fmean(values), std, tuple(values))

    def __getattr__(self, name: str) -> Any:
        """Finds an attribute by its old name, with a warning."""
        if (new := current_attribute("phreg.analysis.class_probe.TokenAccuracy", name)) is not None:
            return getattr(self, new)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True)
class GlobalProbe:
    """What single tokens know of the whole image.

    Attributes:
        layer: Block that the tokens are from; the model's final norm is applied.
        images: Number of images.
        without_outliers: Images that have no outlier, which the outliers' probe does without.
        classes: Number of classes.
        chance: Share of the images that are of the most common class.
        seeds: Seeds of the choice of tokens and of held-out images.
        tokens: The accuracy of each kind of token. Without outliers in both parts of the images these have no
            entry.
    """

    layer: int
    images: int
    without_outliers: int
    classes: int
    chance: float
    seeds: tuple[int, ...]
    tokens: tuple[TokenAccuracy, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it. Files keep the keys of version 0.1."""
        tokens = [
            {"spread" if key == "std" else key: value for key, value in asdict(token).items()}
            for token in self.tokens
        ]
        return asdict(self) | {"tokens": tokens}


def global_probe(
    backbone: Backbone,
    batches: Iterable[Float[Tensor, "_ 3 _ _"]],
    labels: Int64[Tensor, " images"],
    report: NormReport,
    *,
    layer: int | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    test_share: float = 0.25,
    penalty: float = 1e-2,
) -> GlobalProbe:
    """Classifies images by logistic regression on one token each, kind by kind.

    With each seed other patches are drawn, one ordinary and one outlier an image, and other images are held
    out, of each class the same share.

    Args:
        backbone: The model, in eval mode.
        batches: Normalised images.
        labels: Class of every image, in the order of the batches.
        report: Says by which gap, in which block, tokens are outliers; of these images or of others.
        layer: Block to read tokens from, negative from the end; None means the one the report focuses on.
        seeds: One run each; at least one.
        test_share: Share of each class's images to hold out, at least one and not all.
        penalty: L2 penalty of the probe; see `fit_softmax`.

    Raises:
        DataError: Images and labels are not as many, there are none, or a class has one image only.
        PhregError: There is no such block.
    """
    index = probed_layer(backbone, report, layer)
    _, classes, sizes = labels.cpu().unique(return_inverse=True, return_counts=True)
    if sizes.numel() and int(sizes.min()) < 2:
        raise DataError(
            f"a probe of the class asked for on {len(labels)} images of {len(sizes)} classes, one of which "
            "has a single image; give two or more of each, one to learn from and one to test on"
        )
    tokens, present = _one_each(backbone, batches, report, index, seeds)
    images = len(present[ORDINARY])
    _check_count(images, len(labels))
    held = {seed: _held_out_by_class(classes, test_share, seed) for seed in seeds}
    found = []
    for name, chosen in tokens.items():
        values = []
        for seed, inputs in zip(seeds, chosen, strict=True):
            trained, tested = present[name] & ~held[seed], present[name] & held[seed]
            if trained.any() and tested.any():
                values.append(_accuracy(inputs, classes, trained, tested, penalty))
        if values:
            found.append(TokenAccuracy.of(name, int(present[name].sum()), values))
    return GlobalProbe(
        layer=index,
        images=images,
        without_outliers=int((~present[OUTLIER]).sum()),
        classes=len(sizes),
        chance=int(sizes.max()) / images,
        seeds=tuple(seeds),
        tokens=tuple(found),
    )


def _check_count(images: int, labels: int) -> None:
    if images != labels or not images:
        raise DataError(
            f"a probe of the class asked for with {labels} labels, found {images} images; "
            "give one label an image, and at least two images"
        )


def _accuracy(inputs: Tensor, classes: Tensor, trained: Tensor, tested: Tensor, penalty: float) -> float:
    """Trains the probe on some images, and tells the share of others that it gets right."""
    probe = fit_softmax(inputs[trained], classes[trained], int(classes.max()) + 1, penalty)
    right = probe(inputs[tested]).argmax(1) == classes[tested]
    return float(right.float().mean())


def _one_each(
    backbone: Backbone,
    batches: Iterable[Tensor],
    report: NormReport,
    layer: int,
    seeds: Sequence[int],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Picks one token of each kind from every image.

    Returns:
        By kind, the tokens (seeds, images, width), and which images have one (images,).
    """
    picked: dict[str, list[Tensor]] = {ORDINARY: [], OUTLIER: []}
    present: dict[str, list[bool]] = {ORDINARY: [], OUTLIER: []}
    seen = 0
    for batch in batches:
        layout, tokens, outliers = read_tokens(backbone, batch.to(backbone.device), report, layer)
        patches, tokens = layout.patches(tokens).cpu(), tokens.cpu()
        for image in range(len(batch)):
            generators = [keyed_generator("probe", seed, seen) for seed in seeds]
            for kind, mask in ((ORDINARY, ~outliers[image]), (OUTLIER, outliers[image])):
                candidates = mask.nonzero().flatten() if mask.any() else torch.zeros(1, dtype=torch.long)
                at = [
                    int(candidates[torch.randint(len(candidates), (1,), generator=generator)])
                    for generator in generators
                ]
                picked[kind].append(patches[image, at])
                present[kind].append(bool(mask.any()))
            for index, name in enumerate(backbone.special_tokens):
                picked.setdefault(name, []).append(tokens[image, index].expand(len(seeds), -1))
                present.setdefault(name, []).append(True)
            seen += 1
    empty = torch.empty(len(seeds), 0, backbone.spec.width)
    return (
        {kind: torch.stack(rows, dim=1) if rows else empty for kind, rows in picked.items()},
        {kind: torch.tensor(flags, dtype=torch.bool) for kind, flags in present.items()},
    )


def _held_out_by_class(classes: Tensor, share: float, seed: int) -> Tensor:
    """Marks images held out for testing, of each class the same share."""
    held = torch.zeros(len(classes), dtype=torch.bool)
    for label in classes.unique().tolist():
        members = (classes == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=keyed_generator("held out", seed, label))
        held[members[order[: held_count(share, len(members))]]] = True
    return held
