import shutil

import pytest

import phreg
from phreg.config import Config
from phreg.evaluation.digest import differing, digest, hash_contents, what_decides
from phreg.evaluation.results import Results
from phreg.evaluation.tasks.table import resolve_settings


class Settings(Config):
    """Those of a task."""

    words: str | None = None
    """A file, or a name."""


def digest_of(settings, contents="0", task="any", precision="fp32"):
    return digest(what_decides(task, contents, settings, precision))


def test_the_digest_changes_with_all_that_changes_a_figure_and_with_nothing_else():
    one = resolve_settings("linear-segmentation", {})
    digests = {
        digest_of(one),
        digest_of(one, contents="1"),
        digest_of(one, task="other"),
        digest_of(one, precision="bf16"),
        digest_of(resolve_settings("linear-segmentation", {"reading.views": 2})),
        digest_of(resolve_settings("linear-segmentation", {"steps": 7})),
    }
    assert len(digests) == 6
    assert all(len(text) == 12 for text in digests)


def test_the_name_of_a_protocol_changes_nothing_where_all_its_numbers_are_given():
    by_name = resolve_settings("linear-segmentation", {}, "dinov2")
    by_hand = by_name.model_copy(update={"published": None, "differs": ()})
    assert digest_of(by_name) == digest_of(by_hand)


def test_a_file_of_words_counts_by_what_it_holds_wherever_it_lies(tmp_path):
    (tmp_path / "a.toml").write_text("road = ['road']")
    (tmp_path / "b.toml").write_text("road = ['road']")
    (tmp_path / "c.toml").write_text("road = ['way']")
    first, second, third = (digest_of(Settings(words=str(tmp_path / f"{name}.toml"))) for name in "abc")
    assert first == second != third


def test_files_are_known_by_names_and_sizes_in_any_order():
    assert hash_contents([("a", 1), ("b", 2)]) == hash_contents([("b", 2), ("a", 1)])
    assert hash_contents([("a", 1), ("b", 2)]) != hash_contents([("a", 2), ("b", 1)])


def test_what_differs_is_said_by_dotted_key():
    ours = what_decides("any", "0", Settings(words="one"), "fp32")
    assert differing(ours, ours) == []
    theirs = what_decides("any", "0", Settings(words="two"), "bf16")
    assert differing(ours, theirs) == ["precision is fp32, not bf16", "settings.words is one, not two"]


@pytest.fixture
def measured(tiny, photos, tmp_path):
    def measure(name, data=photos, **settings):
        asked = {"task": "consistency", "data": data, "output": tmp_path / name, "device": "cpu"}
        return phreg.evaluate(tiny(), **asked, count=2, views=2, shift=1, **settings)

    return measure


def test_another_copy_of_the_data_has_the_same_digest_and_other_data_do_not(measured, photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    digests = [measured(name, data).records[0].digest for name, data in (("a", photos), ("b", copied))]
    (copied / "00.png").unlink()
    assert digests[0] == digests[1] != measured("c", copied).records[0].digest


def test_results_that_were_measured_otherwise_are_told_apart_in_their_table(measured):
    first, same, other = measured("a"), measured("b"), measured("c", size=48)
    together = Results((first.records[0], same.records[0]))
    assert together.incomparable == []
    assert f"Digest {first.records[0].digest}: " in together.to_markdown()
    mixed = Results((first.records[0], other.records[0]))
    assert "NOT ONE TABLE, as models were measured otherwise: instance 1: settings.size is 48, not None." in (
        mixed.to_markdown()
    )
    assert mixed.to_json()["incomparable"] == ["instance 1: settings.size is 48, not None"]
    assert together.to_json()["digest"] == first.records[0].digest
