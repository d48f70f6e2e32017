"""Turns patch features into maps to look at: components, cosines to a patch or a text, and limits of colour.

A map is one number a patch, or three for a colour, laid out as the image lies. Maps that are compared are
measured with one ruler: features on one basis, colours by joint limits. Models of different widths have no
basis in common; there each has its own, put into the order and turned to the signs of the first model's by
what the maps look like.

    features (images, rows, cols, dim) of each model ──components──► (images, rows, cols, 3) ──colours──► RGB
    features (rows, cols, dim) ──┬─similarity_map────► cosines to one patch
                                 └─similarity_codes──► int8, whose cosines are nearly the features' own
    images, texts ──text_maps──► cosine of each patch to each text

Nothing is drawn here; `phreg.report.maps` does that.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int8
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from phreg.backbones.base import Backbone, Readout
from phreg.backbones.readout import use_readout
from phreg.backbones.text import TextEncoder, text_encoder
from phreg.errors import PhregError

FeatureBatch = Float[Tensor, "images _rows _cols _dim"]
"""Patch features of one model; models compared have the images in common, but neither grid nor width."""

Maps = Float[Tensor, "images _rows _cols count"]

REACH = 3.0
"""Where the first component is cut off, in standard deviations (Darcet et al. 2024, 2309.16588, fig. 20)."""

ROUNDING = 1e-6
"""A component shorter than this share of the features is rounding, and comes out as zeros."""


SPIKES = 0.025
"""Share of patches whose attention may lie beyond what is drawn brightest: about as many are artifacts."""


# -- principal components ------------------------------------------------------------------------------------


def components(models: Sequence[FeatureBatch], count: int = 3, *, shared: bool | None = None) -> list[Maps]:
    """Projects patch features on their principal components, strongest first, whitened.

    Args:
        models: Features of the same images by each model; where bases differ, the first is the one that
            others are aligned to.
        count: Components wanted, no more than the features are wide.
        shared: Whether all models have one basis, which suits a model before and after, or each its own;
            None means one where all are equally wide.

    Returns:
        Each model's components: mean 0 and standard deviation 1 over all that has the same basis.

    Raises:
        PhregError: One basis was asked for of models of different widths.
    """
    widths = {model.shape[-1] for model in models}
    if shared and len(widths) > 1:
        raise PhregError(
            f"one basis asked for of features that are {' and '.join(map(str, sorted(widths)))} channels "
            "wide; leave `shared` unset, and each model gets its own"
        )
    one_basis = len(widths) == 1 if shared is None else shared
    tokens = [model.detach().cpu().double().flatten(0, 2) for model in models]
    if one_basis:
        whitened = _whitened(torch.cat(tokens), count).split([len(part) for part in tokens])
    else:
        whitened = [_whitened(part, count) for part in tokens]
    maps = [part.unflatten(0, model.shape[:3]) for part, model in zip(whitened, models, strict=True)]
    return maps if one_basis else [maps[0], *(_aligned(other, maps[0]) for other in maps[1:])]


def colours(maps: Sequence[Float[Tensor, "images _rows _cols 3"]]) -> list[Tensor]:
    """Scales three components to red, green and blue from 0 to 1, by one scale for all models.

    Each goes from its 1st to its 99th percentile, so that a few artifacts cannot drown the rest.
    """
    low, high = np.quantile(torch.cat([part.flatten(0, 2) for part in maps]).numpy(), (0.01, 0.99), axis=0)
    span = torch.from_numpy(np.maximum(high - low, 1e-12))
    return [((part - torch.from_numpy(low)) / span).clamp(0, 1) for part in maps]


def _whitened(tokens: Float[Tensor, "tokens dim"], count: int) -> Float[Tensor, "tokens count"]:
    centred = tokens - tokens.mean(dim=0)
    # Eigenvectors come smallest first, with signs that mean nothing: point each along its largest channel.
    basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -count:].flip(1)
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    projected = centred @ basis
    std = projected.square().mean(dim=0).sqrt()
    floor = ROUNDING * tokens.square().sum(dim=1).mean().sqrt()
    return torch.where(std > floor, projected / std.clamp_min(1e-300), 0.0)


def _aligned(maps: Maps, first: Maps) -> Maps:
    """Orders and turns components so that each correlates with the first model's as well as it can."""
    grid = (maps.shape[1], maps.shape[2])
    resampled = interpolate(first.movedim(-1, 1), size=grid, mode="bilinear", align_corners=False)
    ours, theirs = maps.flatten(0, 2), resampled.movedim(1, -1).flatten(0, 2)
    correlation = normalize(ours, dim=0).T @ normalize(theirs - theirs.mean(dim=0), dim=0)
    source, slot = linear_sum_assignment(correlation.abs().numpy(), maximize=True)
    signs = correlation[source, slot].sign()
    aligned = torch.empty_like(maps)
    aligned[..., slot] = maps[..., source] * torch.where(signs == 0, 1.0, signs)
    return aligned


# -- cosines to a patch --------------------------------------------------------------------------------------


class SimilarityCodes(NamedTuple):
    """An image's features in so few bits that a page can hold them."""

    codes: Int8[Tensor, "rows cols dims"]
    """One code a patch. The cosine of two codes is nearly that of the two features."""
    error: float
    """Largest difference between those two cosines, over all pairs of patches."""


def similarity_map(
    features: Float[Tensor, "rows cols dim"], row: int, col: int
) -> Float[Tensor, "rows cols"]:
    """Measures the cosine of every patch's feature to that of one patch."""
    unit = normalize(features.detach().float(), dim=-1)
    return unit @ unit[row, col]


def similarity_codes(
    features: Float[Tensor, "rows cols dim"], *, tolerance: float = 0.05, dims: int = 128
) -> SimilarityCodes:
    """Shortens patch features to codes whose cosines are nearly the features' own.

    Features, scaled to length 1, are projected on their strongest directions, not centred, which keeps their
    inner products best (Eckart and Young 1936); then each is scaled to use all 8 bits, which changes no
    cosine. Directions are added until no cosine is off by more than the tolerance.

    Args:
        features: Patch features of one image.
        tolerance: Largest error that is small enough; a ViT-Ti takes 80 bytes a patch to get below 0.05.
        dims: Bytes a patch at most, whatever the error; no more are used than the features are wide.
    """
    unit = normalize(features.detach().cpu().double().flatten(0, 1), dim=-1)
    strongest = (unit @ torch.linalg.eigh(unit.T @ unit).eigenvectors.flip(1)[:, :dims]).float()
    cosines = (unit @ unit.T).float()
    count, longest = 0, strongest.shape[1]
    error = float("inf")
    while error > tolerance and count < longest:
        count = min(count + 16, longest)
        decoded = normalize(_eight_bits(strongest[:, :count]), dim=-1)
        error = (decoded @ decoded.T - cosines).abs().max().item()
    codes = _eight_bits(strongest[:, :count]).to(torch.int8)
    return SimilarityCodes(codes.unflatten(0, features.shape[:2]), error)


def _eight_bits(rows: Float[Tensor, "patches dims"]) -> Float[Tensor, "patches dims"]:
    """Scales each row by itself to whole numbers up to 127."""
    return (127 * rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)).round()


# -- cosines to a text ---------------------------------------------------------------------------------------


@torch.no_grad()
def text_maps(
    backbone: Backbone,
    images: Float[Tensor, "images 3 height width"],
    queries: Sequence[str],
    *,
    readout: Readout | None = None,
    encode: TextEncoder | None = None,
) -> Float[Tensor, "images queries rows cols"]:
    """Measures the cosine of every patch to every text, in the space that a CLIP or SigLIP has for both.

    Args:
        backbone: A whole image-text model; it comes back as it was.
        images: Normalised images on the model's device.
        queries: Texts, encoded as they are: `a photo of a cat` says more to such models than `cat`.
        readout: How the last block is read; None means as phreg trained the model, or else by values alone
            where the model can be read so (a CLIP), since its patches match text poorly otherwise.
        encode: The text tower; None means the model's own, with its own tokenizer.

    Raises:
        PhregError: The model has no text tower or no such space, or cannot be read so.
    """
    embeddings = normalize((encode or text_encoder(backbone))(queries).float(), dim=-1)
    layout = backbone.layout(images)
    last = backbone.block_index(None)
    with use_readout(backbone, readout or _usual_readout(backbone)):
        tokens = layout.patches(backbone.block_tokens(images, [last])[last])
    patches = normalize(backbone.to_joint(backbone.final_norm(tokens)).float(), dim=-1)
    cosines = torch.einsum("ipd,qd->iqp", patches, embeddings.to(patches.device))
    return cosines.unflatten(-1, layout.grid).cpu()


def _usual_readout(backbone: Backbone) -> Readout:
    if backbone.trained_readout != "plain" or backbone.projection is None:
        return backbone.trained_readout
    return "value-only"


# -- limits --------------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """What is drawn darkest and brightest on all the maps that are compared."""

    low: float
    high: float


def joint_limits(*maps: Float[Tensor, "..."], low: float | None = None, trim: float = 0.0) -> Limits:
    """Finds the limits that maps have to be drawn with so that one colour means one value.

    Norms want no more: they are drawn by their logarithm. Cosines to a text may want `trim=0.01`.

    Args:
        maps: All maps that are compared.
        low: The darkest value; None means the least there is.
        trim: Share of patches at either end that may lie beyond the limits.
    """
    values = np.concatenate([part.detach().float().cpu().numpy().ravel() for part in maps])
    lowest, highest = np.quantile(values, (trim, 1 - trim)).tolist()
    return Limits(lowest if low is None else low, highest)


def attention_limits(*maps: Float[Tensor, "..."]) -> Limits:
    """Finds the limits for attention: from none to what all but `SPIKES` of the patches stay below.

    By the largest share there is, artifacts alone would be seen, and a map before would say nothing of one
    after.
    """
    return joint_limits(*maps, low=0.0, trim=SPIKES)
