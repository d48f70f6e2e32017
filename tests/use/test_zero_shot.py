"""Images matched with texts: only the image's side knows of registers, and of them it shows nothing."""

import pytest
import torch
from families_transformers import FAMILIES

import phreg
from phreg.backbones.resolve import adapt
from phreg.testing import registers_masked

PICTURES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXTS = torch.tensor([[0, 5, 6, 7, 1], [0, 8, 9, 10, 1], [0, 11, 12, 13, 1], [0, 14, 15, 16, 1]])
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums over longer rows, with zeros; a visible register changes the first digits."""


@pytest.mark.parametrize("family", ["clip", "metaclip2", "siglip", "aimv2"])
@torch.no_grad()
def test_scores_of_texts_are_what_they_were_once_registers_are_masked(family):
    model = FAMILIES[family]()
    asked = {"input_ids": TEXTS, "pixel_values": PICTURES}
    before = model(**asked)
    backbone = adapt(phreg.add_registers(model, 4))
    seen = model(**asked)
    with registers_masked(backbone, PICTURES):
        masked = model(**asked)
    assert seen.logits_per_image.shape == before.logits_per_image.shape == (3, 4)
    assert torch.equal(seen.text_embeds, before.text_embeds)
    assert not torch.allclose(seen.logits_per_image, before.logits_per_image, **ROUNDING)
    assert torch.allclose(masked.logits_per_image, before.logits_per_image, **ROUNDING)
    assert torch.equal(masked.logits_per_text, masked.logits_per_image.T)


def test_the_contrastive_loss_reaches_the_registers_and_falls():
    model = phreg.add_registers(FAMILIES["clip"]().requires_grad_(False), 4)
    registers = adapt(model).registers
    optimizer = torch.optim.Adam([registers], lr=0.3)
    losses = []
    for _ in range(4):
        loss = model(input_ids=TEXTS[:3], pixel_values=PICTURES, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        assert registers.grad.abs().sum(-1).min() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
