"""What several tests of reports look at."""

import pytest
from looking import from_all_sides


@pytest.fixture(scope="module")
def alone():
    """The sinking model from all sides."""
    return from_all_sides()[2]
