import families_open_clip
import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.model import CLIP
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from phreg.backbones.resolve import adapt
from phreg.data.sources import open_images
from phreg.errors import DataError, PhregError
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.tasks import classification
from phreg.evaluation.tasks.classification import Settings, knn_scores
from phreg.evaluation.tasks.table import resolve_settings


def clusters(seed, images=60, dim=6, classes=3, noise=1.5):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(images) % classes
    return centres[labels] + noise * torch.randn(images, dim, generator=generator), labels


@given(seed=st.integers(0, 1000), neighbours=st.integers(1, 10))
def test_neighbours_vote_as_scikit_learns_do(seed, neighbours):
    features, labels = clusters(seed)
    found = knn_scores(features[:40], labels[:40], features[40:], 3, neighbours, temperature=0.1)
    theirs = KNeighborsClassifier(
        neighbours, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.1)
    ).fit(features[:40].double().numpy(), labels[:40].numpy())
    shares = found / found.sum(1, keepdim=True)
    # exp amplifies fp32 cosines, good to 1e-7, by 1 / temperature.
    expected = theirs.predict_proba(features[40:].double().numpy())
    np.testing.assert_allclose(shares, expected, atol=1e-4)


@pytest.fixture
def reader(tiny, tmp_path):
    return FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"), batch_size=4)


@pytest.fixture
def colours(tmp_path):
    """Two classes that colour tells apart, six pictures each, no splits."""
    for name, colour in (("blue", (20, 20, 220)), ("red", (220, 20, 20))):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(6):
            tint = tuple(part + 3 * number for part in colour)
            Image.new("RGB", (32, 32), tint).save(tmp_path / "set" / name / f"{number}.png")
    return str(tmp_path / "set")


@pytest.mark.parametrize("feature", ["cls", "pooled", "patch-mean"])
def test_colours_are_told_apart_by_every_feature_and_method(reader, colours, feature):
    found = classification.run(reader, colours, Settings(features=(feature,), neighbours=3), seed=0)
    assert found.figures["top1"] == found.figures[f"knn_{feature.replace('-', '_')}_top1"] == 1
    assert found.figures[f"linear_{feature.replace('-', '_')}_top1"] == 1
    assert found.detail["top1"] == {"blue": 1, "red": 1}
    assert found.notes["images"] == {"train": 10, "test": 2}
    assert found.counts == {key: {"images": 2, "classes": 2} for key in found.figures}


def test_the_seed_decides_which_images_are_tested_on(colours):
    def tested(seed):
        return [
            classification._divide(colours, Settings(), seed)[1].images.name(number) for number in range(2)
        ]

    assert tested(0) == tested(0)
    assert len({tuple(tested(seed)) for seed in range(8)}) > 1


def test_the_models_own_head_is_scored_without_training_images(reader, tmp_path):
    for number in range(4):
        Image.effect_noise((32, 32), 60).convert("RGB").save(tmp_path / f"{number}.png")
    (tmp_path / "labels.csv").write_text("".join(f"{number}.png,{number}\n" for number in range(4)))
    head = Settings(methods=("head",))
    found = classification.run(reader, str(tmp_path), head, seed=0)
    assert found.figures["top5"] == 1, "there are five classes"
    (tmp_path / "labels.csv").write_text("0.png,5\n")
    with pytest.raises(PhregError, match="has 5 classes"):
        classification.run(reader, str(tmp_path), head, seed=0)


def test_a_class_with_one_image_cannot_be_divided(reader, colours, tmp_path):
    (tmp_path / "set" / "green").mkdir()
    Image.new("RGB", (32, 32), "green").save(tmp_path / "set" / "green" / "0.png")
    with pytest.raises(DataError, match="green"):
        classification.run(reader, colours, Settings(), seed=0)


@pytest.mark.parametrize("method", ["knn", "linear", "zero-shot"])
def test_one_class_alone_is_refused(clip_reader, tmp_path, method):
    for number in range(4):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{number}.png")
    (tmp_path / "labels.csv").write_text("".join(f"{number}.png,red\n" for number in range(4)))
    with pytest.raises(DataError, match="found 1 class"):
        classification.run(clip_reader, str(tmp_path), Settings(methods=(method,)), seed=0)


@pytest.mark.parametrize("share", [0, 1])
def test_all_images_or_none_are_no_share_to_test_on(share):
    with pytest.raises(PhregError, match="val_share"):
        resolve_settings("classification", {"val_share": share})


def test_methods_can_be_listed_with_commas():
    given = {"methods": "head,knn", "reading.size": "64"}
    found = resolve_settings("classification", given)
    assert found.methods == ("head", "knn")
    assert (found.reading.size, found.reading.fit) == (64, "crop"), "other defaults of a section stay"


def test_every_wrong_setting_is_listed():
    with pytest.raises(PhregError) as caught:
        resolve_settings("classification", {"neighbors": 3, "penalty": "much"})
    assert "did you mean neighbours" in str(caught.value)
    assert "penalty" in str(caught.value)


@pytest.fixture
def clip_reader(tmp_path):
    torch.manual_seed(0)
    text = families_open_clip.TEXT | {"vocab_size": 49408, "context_length": 16}
    model = CLIP(embed_dim=16, vision_cfg=families_open_clip.VISION, text_cfg=text)
    return FeatureReader(
        adapt(families_open_clip.shaken(model)), "clip", FeatureCache(tmp_path / "cache"), batch_size=4
    )


@torch.no_grad()
def test_zero_shot_takes_the_class_whose_name_is_nearest(clip_reader, colours):
    settings = Settings(methods=("zero-shot",), template="all {}")
    found = classification.run(clip_reader, colours, settings, seed=0)

    model = clip_reader.backbone.model
    names = normalize(
        model.encode_text(open_clip.tokenize(["all blue", "all red"], context_length=16)), dim=1
    )
    whole = classification.open_labelled(colours)
    images = torch.stack(
        [torch.from_numpy(np.array(whole.images.read(n))).permute(2, 0, 1) for n in range(12)]
    )
    scores = normalize(model.encode_image(clip_reader.normalise(images)), dim=1) @ names.T
    assert found.figures["top1"] == found.figures["zero_shot_top1"]
    assert found.figures["top1"] == float((scores.argmax(1) == whole.labels).double().mean())
    assert found.notes["images"] == {"train": 0, "test": 12}


def test_classes_without_names_need_words(clip_reader):
    with pytest.raises(DataError, match="words=imagenet"):
        classification._vocabulary(("0", "1"), None)
    assert len(classification._vocabulary(("0", "1"), "imagenet").words) == 1000
    with pytest.raises(DataError, match="2 classes such as cat"):
        classification._vocabulary(("cat", "dog"), "imagenet")


def test_what_needs_no_training_is_tested_on_the_validation_split(clip_reader, tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("blue", "red"):
            (tmp_path / "split" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), name).save(tmp_path / "split" / split / name / f"{number}.png")
    settings = Settings(methods=("zero-shot",), template="{}")
    found = classification.run(clip_reader, str(tmp_path / "split"), settings, seed=0)
    assert found.notes == {"images": {"train": 0, "test": 4}, "classes": 2}


@torch.no_grad()
def test_pooled_outputs_of_a_model_trained_through_a_read_out_are_those_that_its_class_gives(
    clip_reader, colours
):
    def pooled():
        source = open_images(colours)
        return torch.stack([dense.pooled for dense in clip_reader.stream(source, Settings().reading)])

    before = pooled()
    clip_reader.backbone.trained_readout = "value-only"
    after = pooled()
    clip_reader.backbone.trained_readout = "plain"
    assert torch.equal(after, before)


def test_a_gate_guards_the_top_1_of_every_method_on_every_feature(reader, colours):
    settings = Settings(methods=("knn", "linear"), features=("pooled", "cls"), neighbours=3)
    assert set(classification.run(reader, str(colours), settings, seed=0).guarded) == {
        "top1",
        *(f"{method}_{feature}_top1" for method in ("knn", "linear") for feature in ("pooled", "cls")),
    }


def test_several_numbers_of_neighbours_are_measured_and_the_first_is_the_headline(reader, colours):
    several = Settings(methods=("knn",), neighbours=(3, 1, 2))
    found = classification.run(reader, str(colours), several, seed=0)
    alone = {
        number: classification.run(
            reader, str(colours), Settings(methods=("knn",), neighbours=number), seed=0
        ).figures["top1"]
        for number in (1, 2, 3)
    }
    assert found.figures["top1"] == alone[3]
    assert found.detail["knn_pooled_top1"] == {f"{number} neighbours": alone[number] for number in (3, 1, 2)}
    assert resolve_settings("classification", {"neighbours": "10,20"}).neighbours == (10, 20)
    assert resolve_settings("classification", {"neighbours": "10"}).neighbours == 10


def test_what_each_picture_adds_makes_up_the_figures(reader, colours, whole_sample):
    found = classification.run(reader, colours, Settings(methods=("knn", "linear"), neighbours=3), seed=0)
    whole_sample(found, *found.figures)
