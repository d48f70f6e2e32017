"""Grad-CAM at any block of a patched model: where gradients arrive in each library."""

import families_open_clip
import families_timm
import families_transformers
import pytest
import torch

import phreg
from phreg.backbones.resolve import adapt

PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def grad_cam(tokens, gradients):
    """Weighs channels by their mean gradients over patches: (batch, tokens, width) -> (batch, tokens)."""
    return (tokens * gradients.mean(1, keepdim=True)).sum(-1).relu()


def by_hook(model, block, patches_of):
    """Takes a block's patches and their gradients, as pytorch-grad-cam's `target_layers` does."""
    seen = []
    handle = block.register_forward_hook(lambda _, args, output: seen.append(output))
    output = model(PICTURES)
    handle.remove()
    scores = output if torch.is_tensor(output) else output.logits
    gradients = torch.autograd.grad(scores[:, 0].sum(), seen[0])[0]
    return grad_cam(patches_of(seen[0]), patches_of(gradients))


@pytest.mark.parametrize("index", [0, 1])
@torch.enable_grad()
def test_hidden_states_of_transformers_give_the_map_that_a_hook_on_the_block_gives(index):
    model = phreg.add_registers(families_transformers.FAMILIES["vit-classifier"](), 3)
    output = model(PICTURES, output_hidden_states=True)
    state = output.hidden_states[index + 1]
    state.retain_grad()
    output.logits[:, 0].sum().backward()

    found = grad_cam(state[:, 1:], state.grad[:, 1:])

    # Outside of a call for hidden states, a block's output has its three registers behind CLS.
    expected = by_hook(model, adapt(model).blocks[index], lambda tokens: tokens[:, 1 + 3 :])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.shape == (2, 16)
    assert found.any()


@pytest.mark.parametrize(
    ("build", "ahead"),
    [(families_timm.FAMILIES["vit"], 1 + 3), (families_open_clip.FAMILIES["tower"], 1 + 3)],
    ids=["timm", "open_clip"],
)
@torch.enable_grad()
def test_in_timm_and_open_clip_a_hook_on_a_block_gives_the_map_and_intermediates_lie_off_the_path(
    build, ahead
):
    stock, model = build(), phreg.add_registers(build(), 3)
    for one in (stock, model):  # as the libraries have it, registers or not
        found = one.forward_intermediates(PICTURES, indices=[0])
        inner = found["image_intermediates"] if isinstance(found, dict) else found[1]
        end = found["image_features"] if isinstance(found, dict) else found[0]
        assert torch.autograd.grad(end.sum(), inner[0], allow_unused=True)[0] is None

    found = by_hook(model, adapt(model).blocks[0], lambda tokens: tokens[:, ahead:])

    assert found.shape == (2, 16)
    assert found.any()
