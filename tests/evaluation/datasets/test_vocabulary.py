"""Words for classes: phreg's lists fit the data sets, synonyms and templates are averaged as said."""

import pytest
import torch
from torch.nn.functional import normalize

from phreg.errors import DataError, PhregError
from phreg.evaluation.datasets.segmentation import CAMVID, CITYSCAPES, VOC
from phreg.evaluation.datasets.vocabulary import (
    Queries,
    Vocabulary,
    embed_vocabulary,
    find_vocabulary,
    shipped,
)

SIZES = {
    "ade20k": 150, "camvid": 11, "cityscapes": 19, "coco-object": 81, "coco-stuff": 171,
    "pascal-context-59": 59, "pascal-context-60": 60, "voc20": 20, "voc21": 21,
}  # fmt: skip


def encode(texts):
    """An embedding that tells texts apart by length and letters."""
    return torch.tensor([[len(text), text.count("a"), text.count("c") + 1] for text in texts]).float()


def test_every_list_has_as_many_classes_as_its_data_set():
    assert {name: len(words) for name, words in shipped().items()} == SIZES
    for name, words in shipped().items():
        flat = [word for synonyms in words.values() for word in synonyms]
        assert all(word == word.strip() for word in flat), name
        assert all(len(set(synonyms)) == len(synonyms) for synonyms in words.values()), name


@pytest.mark.parametrize(
    ("classes", "name"),
    [(VOC, "voc21"), (VOC[1:], "voc20"), (CAMVID, "camvid"), (tuple(CITYSCAPES.values()), "cityscapes")],
)
def test_a_data_set_is_known_by_its_classes_in_its_own_order(classes, name):
    found = find_vocabulary(classes)
    assert found.name == name
    assert found.words == tuple(shipped()[name][label] for label in classes)


def test_background_words_are_no_objects_of_the_data_set():
    for name in ("voc21", "coco-object"):
        background, *others = shipped()[name].values()
        assert not set(background) & {word for words in others for word in words}, name


def test_an_unknown_data_set_is_called_as_it_calls_itself():
    assert find_vocabulary(("red, crimson", "blue")).words == (("red", "crimson"), ("blue",))


def test_a_list_that_lacks_a_class_or_is_broken_is_refused(tmp_path):
    with pytest.raises(DataError, match="1 of which it lacks: zebra"):
        find_vocabulary(("car", "zebra"), "camvid")
    with pytest.raises(DataError, match="give one of ade20k"):
        find_vocabulary(("car",), str(tmp_path / "none.toml"))
    (tmp_path / "broken.toml").write_text('car = "car"')
    with pytest.raises(DataError, match="no list of words for car"):
        find_vocabulary(("car",), str(tmp_path / "broken.toml"))


def test_templates_are_normalised_averaged_and_normalised():
    found = embed_vocabulary(Vocabulary("own", (("cat",), ("a", "aa"))), encode, "a {}")
    assert found.classes.tolist() == [0, 1, 1]
    torch.testing.assert_close(found.embeddings, normalize(encode(["a cat", "a a", "a aa"]), dim=1))
    from open_clip import OPENAI_IMAGENET_TEMPLATES as templates

    (query,) = embed_vocabulary(Vocabulary("own", (("cat",),)), encode).embeddings
    each = normalize(encode([template("cat") for template in templates]), dim=1)
    torch.testing.assert_close(query, normalize(each.mean(0), dim=0))
    with pytest.raises(PhregError, match="no place"):
        embed_vocabulary(Vocabulary("own", (("cat",),)), encode, "a photo")


def test_synonyms_are_averaged_into_one_query_or_the_best_counts():
    own = Vocabulary("own", (("cat",), ("a", "aa")))
    each, mean = (embed_vocabulary(own, encode, "{}", synonyms) for synonyms in ("max", "mean"))
    assert mean.classes.tolist() == [0, 1]
    torch.testing.assert_close(mean.embeddings[1], normalize(each.embeddings[1:].mean(0), dim=0))
    best = Queries(each.embeddings, each.classes).best(torch.tensor([[0.1], [0.5], [0.4]]))
    assert best.flatten().tolist() == pytest.approx([0.1, 0.5])
