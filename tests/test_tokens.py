import pytest
import torch

from phreg.tokens import TokenLayout


def test_parts_of_a_sequence_are_prefix_registers_and_patches_in_this_order():
    layout = TokenLayout(num_prefix=1, num_registers=2, grid=(2, 3))
    tokens = torch.arange(9.0).view(1, 9, 1)
    assert layout.num_tokens == 9
    assert layout.prefix(tokens).flatten().tolist() == [0]
    assert layout.registers(tokens).flatten().tolist() == [1, 2]
    assert layout.to_grid(tokens).squeeze(-1).tolist() == [[[3, 4, 5], [6, 7, 8]]]


def test_a_sequence_of_another_length_is_refused():
    with pytest.raises(ValueError, match="expected 9 tokens"):
        TokenLayout(1, 2, (2, 3)).to_grid(torch.zeros(1, 8, 1))
