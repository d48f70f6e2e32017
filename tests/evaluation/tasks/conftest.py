import numpy as np
import pytest

from phreg.evaluation import bootstrap


@pytest.fixture
def whole_sample(monkeypatch):
    """Draws each picture once, in the one sample there is: every figure must then be that of the task."""

    def figure(of):
        reached, there = of.reached.sum(0), of.there.sum(0)
        return np.array([np.mean(reached[there > 0] / there[there > 0])])

    monkeypatch.setattr(bootstrap, "_in_samples", figure)

    def check(found, *names):
        assert set(found.resampled) >= set(names)
        for name, values in found.resampled.items():
            assert values == [pytest.approx(found.figures[name], abs=1e-9)], name
        assert found.pictures

    return check
