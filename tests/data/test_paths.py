"""phreg.data.paths: the order of names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phreg.data.paths import natural_order


@given(numbers=st.lists(st.integers(0, 10**12), unique=True), width=st.integers(0, 8))
def test_names_in_natural_order_are_in_the_order_of_their_numbers(numbers, width):
    names = [f"take 2/frame{number:0{width}}b.jpg" for number in numbers]
    assert [names.index(name) for name in sorted(names, key=natural_order)] == [
        numbers.index(number) for number in sorted(numbers)
    ]


@pytest.mark.parametrize(
    "names", [["1", "a", "a1", "a1b", "a2", "a10"], ["٣.png", "4.png"], ["a01", "a1"], ["²", "³"]]
)
def test_the_natural_order_of_odd_names_is_defined(names):
    mixed = names[::-1]
    assert sorted(mixed, key=natural_order) == names
