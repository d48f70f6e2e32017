"""Dense heads of CLIP against loops over heads and tokens, written from the papers, in fp64."""

import math

import families_open_clip
import pytest
import torch
from torch.nn.functional import layer_norm

from phreg.backbones.readout import use_readout
from phreg.backbones.resolve import adapt

CLOSE = 1e-6
HEADS, ROWS, COLS = 4, 4, 4


@pytest.fixture
def clip():
    return families_open_clip.clip().double().eval()


def normed(tokens, norm):
    return layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def gaussian(row, col):
    """NACLIP's omega of two tokens, 0 being CLS: a Gaussian of their distance, 5 patches wide."""
    if 0 in (row, col):
        return 0.0
    (y, x), (v, u) = divmod(row - 1, COLS), divmod(col - 1, COLS)
    return math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * 5.0**2))


def attended(block, tokens, likenesses, near=lambda _row, _col: 0.0):
    """Attention of one picture, head by head and token by token.

    `likenesses` lists what is compared with itself, q or k; their softmaxed weights are added.
    """
    queries, keys, values = (
        normed(tokens, block.ln_1) @ weight.T + bias
        for weight, bias in zip(
            block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True
        )
    )
    sides, width = {"q": queries, "k": keys}, values.shape[1] // HEADS
    found = torch.zeros_like(values)
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        for side in likenesses:
            compared = sides[side][:, part]
            for row in range(len(tokens)):
                scores = [
                    float(compared[row] @ compared[col]) / math.sqrt(width) + near(row, col)
                    for col in range(len(tokens))
                ]
                highest = max(scores)
                powers = [math.exp(score - highest) for score in scores]
                for col, power in enumerate(powers):
                    found[row, part] += power / sum(powers) * values[col, part]
    return found @ block.attn.out_proj.weight.T + block.attn.out_proj.bias


def naclip(block, tokens):
    """Hajimiri et al. 2025, section 3: keys with keys and the Gaussian; neither residual nor MLP."""
    return attended(block, tokens, "k", gaussian)


def clearclip(block, tokens):
    """Lan et al. 2024, section 3: queries with queries; neither residual nor MLP."""
    return attended(block, tokens, "q")


def sclip(block, tokens):
    """Wang et al. 2024, section 3: queries with queries plus keys with keys; residual and MLP stay."""
    after = tokens + attended(block, tokens, "qk")
    return after + block.mlp(normed(after, block.ln_2))


@torch.no_grad()
@pytest.mark.parametrize("head", [naclip, clearclip, sclip])
def test_a_dense_head(clip, head):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    visual, entering = clip.visual, {}
    block = visual.transformer.resblocks[-1]
    hook = block.register_forward_pre_hook(lambda _block, args: entering.update(tokens=args[0]))
    visual(images)
    hook.remove()
    expected = torch.stack(
        [normed(head(block, tokens), visual.ln_post) @ visual.proj for tokens in entering["tokens"]]
    )
    backbone = adapt(clip)
    with use_readout(backbone, head.__name__):
        found = backbone(images).patches
    torch.testing.assert_close(found, expected[:, 1:].unflatten(1, (ROWS, COLS)), atol=CLOSE, rtol=0)
