import pytest
import torch

from phreg.analysis.positions import describe_positions, fixed_share


def shares(*at: tuple[int, int], share: float = 1.0, elsewhere: float = 0.0) -> torch.Tensor:
    histogram = torch.full((8, 8), elsewhere)
    for position in at:
        histogram[position] = share
    return histogram


BORDER = [(row, col) for row in range(8) for col in range(8) if {row, col} & {0, 7}]


@pytest.mark.parametrize(
    ("histogram", "words"),
    [
        (shares((0, 0), (0, 7), (7, 0), (7, 7)), "at the corners"),
        (shares((0, 0), (7, 7), share=0.1, elsewhere=0.001), "at the corners"),
        (shares((3, 4), (5, 1)), "at fixed patches"),
        (shares(*BORDER, share=0.1), "along the border"),
        (shares(elsewhere=0.02), "anywhere in the image"),
        (shares(*BORDER, share=0.02, elsewhere=0.02), "anywhere in the image"),
    ],
)
def test_the_place_of_artifacts_is_named(histogram: torch.Tensor, words: str):
    assert describe_positions(histogram) == words


def test_artifacts_that_the_input_does_not_move_are_all_at_fixed_positions():
    assert fixed_share(shares((0, 0), (3, 4), share=0.9)) == 1


def test_artifacts_that_follow_the_content_are_not():
    assert fixed_share(shares(elsewhere=0.02)) == 0


def test_the_fixed_share_counts_artifacts_not_positions():
    # One patch in every image, ten in a tenth of them: as many artifacts of either kind.
    mixed = shares((0, 0), *[(5, col) for col in range(8)], (6, 0), (6, 1), share=0.1)
    mixed[0, 0] = 1
    assert fixed_share(mixed) == pytest.approx(0.5)


def test_no_artifacts_are_nowhere_fixed():
    assert fixed_share(torch.zeros(4, 4)) == 0
