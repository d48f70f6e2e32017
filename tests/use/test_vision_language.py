"""A LLaVA whose vision tower has registers: it sees, writes and learns as before."""

import pytest
import torch
import transformers as hf
from families_transformers import VISION, build

import phreg
from phreg.backbones.resolve import adapt
from phreg.testing import registers_masked

COUNT = 9
"""Registers: the tower's 26 tokens are more than the language model ever reads, so only they are masked."""

IMAGE = 60
"""The token that stands for a patch."""

PICTURE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPT = {
    "input_ids": torch.tensor([[1, *[IMAGE] * 16, 5]]),
    "attention_mask": torch.ones(1, 18, dtype=torch.long),
    "pixel_values": PICTURE,
}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums over longer rows, with zeros; a visible register changes the first digits."""


@pytest.fixture
def llava():
    language = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    text = hf.LlamaConfig(**language, num_attention_heads=2, num_key_value_heads=2)
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**VISION), text_config=text)
    config.image_token_id, config.image_seq_length = IMAGE, 16
    return build(hf.LlavaForConditionalGeneration, config)


def write(model):
    """Generates greedily, and returns the words with the scores of each."""
    asked = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answer = model.generate(**PROMPT, **asked)
    return answer.sequences, torch.stack(answer.logits)


@torch.no_grad()
def test_it_writes_the_same_words_once_its_registers_are_masked(llava):
    words, scores = write(llava)
    backbone = adapt(phreg.add_registers(llava, COUNT))
    seen_words, seen_scores = write(llava)
    with registers_masked(backbone, PICTURE):
        masked_words, masked_scores = write(llava)
    assert seen_words.shape == words.shape
    assert not torch.allclose(seen_scores, scores, **ROUNDING)
    assert torch.equal(masked_words, words)
    assert torch.allclose(masked_scores, scores, **ROUNDING)


def test_registers_learn_from_the_loss_on_words(llava):
    phreg.add_registers(llava.requires_grad_(False), COUNT)
    registers = adapt(llava).registers
    optimizer = torch.optim.Adam([registers], lr=0.3)
    labels = PROMPT["input_ids"].masked_fill(PROMPT["input_ids"] == IMAGE, -100)
    losses = []
    for _ in range(4):
        loss = llava(**PROMPT, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert registers.grad.abs().sum(-1).min() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
