from dataclasses import replace
from typing import Any

import pytest
import torch
from looking import looked_at, moved, sinking_model
from planted import CORNERS, Planted, pictures

from phreg.analysis.inspection import Inspection
from phreg.analysis.norms import outliers
from phreg.report.verdict import advice, causes, disagreement, headline, nothing_to_repair, percent, verdict
from phreg.sinks.kinds import AttentionRole, Kind
from phreg.sinks.locate import Population, Sinks, Unit


@pytest.fixture(scope="module")
def clean() -> Inspection:
    return looked_at("timm/vit")


@pytest.fixture(scope="module")
def sinking() -> Inspection:
    backbone, images = sinking_model()
    return looked_at(backbone, images=images)


def judged(pushes: dict) -> str:
    return verdict(outliers(Planted(pushes), [pictures()]))


def test_a_clean_model_is_said_to_be_clean():
    assert judged({}) == "No sinks found: the norms of patch tokens show no gap in any block."


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


def test_what_is_left_as_it_is_is_told_with_what_inspect_says_of_it():
    clean, planted = (outliers(Planted(pushes), [pictures()]) for pushes in ({}, {2: (CORNERS, 100.0)}))
    said = nothing_to_repair(clean)
    assert said.startswith(f"Nothing to repair. {verdict(clean)}")
    assert said.endswith("--force distils it.")
    hidden = replace(clean, normed=planted.normed)
    said = nothing_to_repair(hidden)
    assert said.startswith(f"Nothing to relocate. {verdict(hidden)}")
    assert "only after the final norm" in said
    assert said.endswith("--force distils it without relocation.")


def sinks(*units: Unit, explained: float) -> Sinks:
    norms = outliers(Planted({2: (CORNERS, 100.0)}), [pictures()])
    return Sinks(norms, 2, units, explained, (), None, (torch.zeros(4, 16),))


UNITS = [Unit(block=2, index=index, sink_level=10.0, baseline=0.0, share=0.5) for index in (7, 9)]


def test_the_headline_is_one_sentence_that_ends_with_the_cause():
    said = headline((found := sinks(*UNITS[:1], explained=0.987)).norms, found)
    assert said == f"{verdict(found.norms).removesuffix('.')}; 1 hidden unit causes 98.7 % of them."
    both = sinks(*UNITS, explained=1.0)
    assert headline(both.norms, both).endswith("; 2 hidden units cause 100.0 % of them.")
    none = sinks(explained=0.0)
    assert headline(none.norms, none).endswith("mostly at the corners; no hidden unit explains them.")


def test_advice_names_the_method_with_the_figures(clean: Inspection, sinking: Inspection):
    agree = "Patch features agree to 0.970 with the model's own moved views; averages over views agree to"
    said = advice(replace(clean, consistency=moved(0.024, 0.003)))
    assert said == f"{agree} 0.994: up to 0.024 ± 0.003 to gain by --method denoise."
    said = advice(replace(sinking, consistency=moved(0.024, 0.003)))
    assert said == (
        f"Sinks can be moved into registers: --method relocate. {agree} 0.994: up to 0.024 ± 0.003 to gain."
    )
    said = advice(replace(clean, consistency=moved(0.001, 0.0004)))
    assert said == f"{agree} 0.971: nothing to gain (0.001 ± 0.000, below 0.005)."
    said = advice(replace(clean, consistency=moved(0.012, 0.008)))
    assert said == f"{agree} 0.982: nothing sure to gain (0.012 ± 0.008, less than 2 standard errors)."
    said = advice(replace(clean, consistency=moved(0.012, None)))
    assert said == f"{agree} 0.982: up to 0.012 to gain by --method denoise."


def test_advice_says_why_nothing_was_measured_and_nothing_where_nobody_asked(
    clean: Inspection, sinking: Inspection
):
    bare = replace(clean, consistency=None)
    assert advice(bare) == ""
    assert advice(replace(bare, not_moved="too small")) == (
        "Agreement with moved views was not measured: too small."
    )
    assert advice(replace(sinking, consistency=None)) == (
        "Sinks can be moved into registers: --method relocate."
    )


def test_what_is_fixed_to_the_frame_is_set_against_chance():
    assert disagreement(moved(0.02, 0.003)) == (
        "Measured on 10 images, in 20 moved views of each. 20.0 % of the disagreement is the same in all "
        "images, and so fixed to the frame; of images that have nothing in common it would be 10.0 %."
    )
    single = replace(moved(0.02, None), maps=moved(0.02, None).maps[:1])
    assert disagreement(single).startswith("Measured on 1 image, in 20 moved views")
    assert "%" not in disagreement(single)


def test_without_sinks_the_headline_is_the_verdict():
    clean = outliers(Planted(), [pictures()])
    assert headline(clean, None) == verdict(clean)


def test_causes_are_named_by_block_and_unit():
    assert causes(sinks(*UNITS, explained=1.0)) == (
        "Sinks emerge in block 2, triggered by position; 2 hidden units cause 100.0 % of them "
        "(block:unit 2:7, 2:9)."
    )
    drawn = replace(sinks(*UNITS[:1], explained=0.5), attention=(0.0, 0.02, 0.31, 0.3))
    assert causes(drawn).endswith("They attract up to 31.0 % of the attention of CLS.")
    without = replace(drawn, norms=replace(drawn.norms, tokens=()))
    assert causes(without).endswith("They attract up to 31.0 % of the attention of the patches.")


def population(block: int, rate: float, **kind: Any) -> Population:
    known = {"writer": "MLP", "mlp": 0.9, "attention": 0.124, "input": -0.024}
    found = Kind(**known | {"role": "ignored", "looked_at": 0.1, "value": 1.0} | kind)
    return Population(block, 3, "high", rate, (), 0.0, found, (torch.zeros(1, 16),), ())


def test_causes_say_what_writes_the_largest_population_and_where_others_emerge():
    one = sinks(explained=0.0)
    found = replace(one, populations=(population(3, 0.004), population(2, 0.02)))
    assert causes(found) == (
        "Sinks emerge in block 2, triggered by position; no hidden unit explains them. Of what they hold "
        "after block 2, its MLP wrote 90 %, its attention 12 %, and earlier blocks -2 %. Other sinks, "
        "0.4 % of patches, emerge in block 3."
    )
    unread = replace(one, populations=(population(2, 0.02, writer=None, mlp=None, attention=None),))
    assert causes(unread) == causes(one)


@pytest.mark.parametrize(
    ("role", "reads"), [("parked", "next to nothing there: attention is parked"), ("read", "what they hold")]
)
def test_causes_say_what_attention_does_with_sinks(role: AttentionRole, reads: str):
    found = replace(sinks(explained=0.0), populations=(population(2, 0.02, role=role, looked_at=0.985),))
    assert causes(found).endswith(
        f" One head of a later block looks there with 98.5 % of its attention, and reads {reads}."
    )


def test_several_kinds_of_sink_are_counted():
    one = sinks(*UNITS, explained=1.0)
    assert "kind" not in causes(one)
    assert causes(replace(one, triggers=one.triggers * 2)).endswith(
        "(block:unit 2:7, 2:9, 2 clusters of sinks)."
    )


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0, "0.0 %"), (0.0198, "2.0 %"), (0.0004, "0.04 %"), (0.00123, "0.12 %"), (0.125, "12.5 %")],
)
def test_shares_are_written_as_per_cent(share: float, words: str):
    assert percent(share) == words
