"""What writes a sink, and what attention does with it, is told by cutting and by weights."""

import pytest
import torch
from planted import CORNERS, Planted, pictures
from sinking import faint, plant, pushed

from phreg.backbones.resolve import adapt
from phreg.sinks.locate import find_sinks


def kind(backbone, images):
    (population,) = find_sinks(backbone, images.split(8)).populations
    return population.kind


def test_a_unit_writes_what_the_mlp_writes(tiny):
    backbone = adapt(tiny(depth=4))
    images = faint(backbone)
    plant(backbone, 1, 5, images)
    found = kind(backbone, images)
    assert found.writer == "units"
    assert found.mlp == pytest.approx(1, abs=0.02)
    assert found.mlp + found.attention + found.input == pytest.approx(1, abs=1e-6)


def test_nine_units_are_many(tiny):
    backbone = adapt(tiny(depth=4))
    images = faint(backbone)
    for unit in range(9):
        plant(backbone, 1, unit, images)
    assert kind(backbone, images).writer == "many units"


def test_attention_that_writes_is_named(tiny):
    backbone = adapt(tiny(depth=4))
    pushed(backbone.model.blocks[1].attn, token=1)
    found = kind(backbone, torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert found.writer == "attention"
    assert found.attention > 0.95


def test_what_enters_with_the_position_embedding_is_the_inputs(tiny):
    backbone = adapt(tiny(depth=4))
    with torch.no_grad():
        backbone.model.pos_embed[0, 1] *= 1e5
    found = kind(backbone, torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert found.writer == "input"
    assert found.input == pytest.approx(1, abs=0.01)


def test_what_cannot_be_read_is_not_known():
    found = kind(Planted({2: (CORNERS, 100.0)}), pictures(16))
    assert (found.writer, found.mlp, found.attention) == (None, None, None)
    assert found.input == pytest.approx(0, abs=0.05)
    assert (found.role, found.looked_at, found.value) == (None, None, None)


def looked_at(backbone, block, *, reads):
    """Lets every head of a block look at the first patch, which is a sink, and read nothing there or much."""
    attention = backbone.model.blocks[block].attn
    width, sink = backbone.spec.width, 100 * torch.eye(backbone.spec.width)[0]

    def edit(_module, _args, output):
        queries, keys, values = output.clone().chunk(3, dim=-1)
        queries[...], keys[:, 1], values[:, 1] = 1.0, 20.0, 5.0 if reads else 0.0
        return torch.cat([queries, keys, values], dim=-1)

    attention.qkv.register_forward_hook(edit)
    pushed(backbone.model.blocks[0].attn, token=1)
    assert sink.shape == (width,)


@pytest.mark.parametrize(("reads", "role"), [(False, "parked"), (True, "read")])
def test_attention_is_parked_where_it_looks_and_reads_nothing(tiny, reads, role):
    backbone = adapt(tiny(depth=4))
    looked_at(backbone, 2, reads=reads)
    found = kind(backbone, torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert found.role == role
    assert found.looked_at > 0.99
    assert (found.value == 0) == (not reads)


def test_sinks_that_nobody_looks_at_are_ignored(tiny):
    backbone = adapt(tiny(depth=4))
    pushed(backbone.model.blocks[1].attn, token=1)
    for block in (2, 3):
        torch.nn.init.zeros_(backbone.model.blocks[block].attn.qkv.weight)  # it looks everywhere alike
    found = kind(backbone, torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert found.role == "ignored"
    assert found.looked_at == pytest.approx(1 / 17, rel=1e-4)


def test_sinks_of_the_last_block_have_no_block_that_attends_to_them(tiny):
    backbone = adapt(tiny(depth=2))
    pushed(backbone.model.blocks[1].attn, token=1)
    found = kind(backbone, torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert found.writer == "attention"
    assert (found.role, found.looked_at, found.value) == (None, None, None)
