from dataclasses import replace

import pytest
from planted import CORNERS, Planted, pictures

from phreg.analysis.norms import outliers
from phreg.report.verdict import percent, verdict


def judged(pushes: dict) -> str:
    return verdict(outliers(Planted(pushes), [pictures()]))


def test_a_clean_model_is_said_to_be_clean():
    assert judged({}) == "No artifacts found: the norms of patch tokens show no gap in any block."


def test_artifacts_are_told_by_share_strength_block_and_place():
    # Four of 64 patches; the fake model's tokens have a norm of about 2.
    sentence = judged({2: (CORNERS, 100.0)})
    assert sentence.startswith("6.2 % of patch tokens are artifacts: their norm is ")
    assert sentence.endswith("x the median, from block 2 on (of 0 to 3), mostly at the corners.")
    assert 30 < float(sentence.split("norm is ")[1].split("x")[0]) < 80


def test_hidden_artifacts_are_not_passed_over():
    sentence = judged({1: ((10, 20), 100.0), 3: ((10, 20), -100.0)})
    assert sentence.startswith("No artifacts in the last block, but inside the model: in block ")
    assert "3.1 %" in sentence
    assert sentence.endswith("mostly at fixed patches.")


def test_tokens_that_stand_apart_only_after_the_final_norm_are_mentioned():
    clean, planted = (outliers(Planted(pushes), [pictures()]) for pushes in ({}, {2: (CORNERS, 100.0)}))
    sentence = verdict(replace(clean, normed=planted.normed))
    assert sentence.startswith(
        "6.2 % of patch tokens stand apart, but only after the final norm: their norm is 0.3x"
    )


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0, "0.0 %"), (0.0198, "2.0 %"), (0.0004, "0.04 %"), (0.00123, "0.12 %"), (0.125, "12.5 %")],
)
def test_shares_are_written_as_per_cent(share: float, words: str):
    assert percent(share) == words
