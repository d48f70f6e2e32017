"""Zero-shot segmentation: what the temperature and the threshold decide, and the whole against a slow one."""

import families_open_clip
import families_transformers
import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from torch.nn.functional import interpolate, normalize

from phreg.backbones.resolve import adapt
from phreg.errors import PhregError
from phreg.evaluation.datasets.vocabulary import Queries
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.tasks import quantised
from phreg.evaluation.tasks.table import resolve_settings
from phreg.evaluation.tasks.zero_shot_segmentation import PROTOCOLS, READOUTS, Settings, choose_classes, run
from phreg.registers import add_registers, remove_registers

WHOLE = {"reading": FeatureConfig(size=32), "template": "a {}", "threshold": 0.0}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    text = families_open_clip.TEXT | {"vocab_size": 49408, "context_length": 16}
    model = CLIP(embed_dim=16, vision_cfg=families_open_clip.VISION, text_cfg=text)
    return families_open_clip.shaken(model)


@pytest.fixture
def reader(clip, tmp_path):
    return FeatureReader(adapt(clip), "clip", FeatureCache(tmp_path / "cache"), batch_size=2)


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / kind / "val").mkdir(parents=True)
    for number in range(2):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32)).save(root / "images" / "val" / f"{number}.png")
        mask = generator.integers(0, 3, (4, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(mask).save(root / "masks" / "val" / f"{number}.png")
    (root / "classes.txt").write_text("sky, cloud\nroad\ncar\n")
    return root


def queries(classes):
    return Queries(torch.eye(len(classes)), torch.tensor(classes))


def test_the_best_word_of_a_class_counts_and_not_the_sum():
    cosines = torch.tensor([[0.30], [0.29], [0.31]])  # together the synonyms of class 0 are likelier
    assert choose_classes(cosines, queries([0, 0, 1]), 0.025).tolist() == [1]


def test_a_pixel_without_a_probable_word_is_background_where_there_is_one():
    cosines = torch.tensor([[0.0, 0.0], [0.1, 0.5], [0.0, 0.0]])
    surest = (cosines / 0.1).softmax(0).amax(0)
    threshold = float(surest.mean())
    found = choose_classes(cosines, queries([0, 1, 2]), 0.1, threshold, background=0)
    assert found.tolist() == [0, 1]
    assert choose_classes(cosines, queries([0, 1, 2]), 0.1, threshold).tolist() == [1, 1]
    # A lower temperature is surer.
    assert choose_classes(cosines, queries([0, 1, 2]), 0.01, threshold, background=0).tolist() == [1, 1]


@torch.no_grad()
def test_the_task_equals_a_slow_computation(reader, clip, pictures):
    found = run(reader, str(pictures), Settings(**WHOLE, head="plain"), seed=0)

    texts = open_clip.tokenize(["a sky", "a cloud", "a road", "a car"], context_length=16)
    words = normalize(clip.encode_text(texts), dim=1)
    inputs, truth = [], []
    for number in range(2):
        pixels = np.array(Image.open(pictures / "images" / "val" / f"{number}.png")) / np.float32(255)
        inputs.append((pixels - open_clip.OPENAI_DATASET_MEAN) / open_clip.OPENAI_DATASET_STD)
        truth.append(np.array(Image.open(pictures / "masks" / "val" / f"{number}.png")))
    images, truth = torch.tensor(np.stack(inputs)).float().permute(0, 3, 1, 2), np.stack(truth)
    clip.visual.output_tokens = True
    patches = clip.visual(images)[1]  # behind ln_post
    clip.visual.output_tokens = False
    cosines = normalize(patches @ clip.visual.proj, dim=-1) @ words.T
    maps = interpolate(cosines.transpose(1, 2).unflatten(2, (4, 4)), (32, 32), mode="bilinear").numpy()
    chosen = np.array([0, 0, 1, 2])[maps.argmax(1)]
    ious = [((chosen == c) & (truth == c)).sum() / ((chosen == c) | (truth == c)).sum() for c in range(3)]
    likely = np.stack([maps[:, :2].max(1), maps[:, 2], maps[:, 3]], axis=1)
    pearsons = [
        np.mean([np.corrcoef(likely[i, c].ravel(), (truth[i] == c).ravel())[0, 1] for i in range(2)])
        for c in range(3)
    ]

    assert next(iter(found.figures)) == "miou"
    assert found.figures["miou"] == pytest.approx(np.mean(ious), abs=0.005)  # a few pixels may be ties
    assert found.figures["pearson"] == pytest.approx(np.mean(pearsons), abs=1e-3)
    over = {"pixels": 2 * 32 * 32, "images": 2}
    assert found.counts["miou"] == found.counts["mean_accuracy"] == over | {"classes": 3}
    assert found.counts["pixel_accuracy"] == over
    assert found.counts["pearson"] == {"pairs": 6, "images": 2, "classes": 3}
    assert found.notes["words"] == "the data set's own"
    assert found.notes["queries"] == 4


@pytest.mark.parametrize("head", ["maskclip", "sclip", "clearclip", "naclip"])
def test_every_head_runs_with_registers_and_leaves_the_model_as_it_was(reader, clip, pictures, head):
    add_registers(reader.backbone, 2)
    found = run(reader, str(pictures), Settings(**WHOLE, head=head), seed=0)
    remove_registers(reader.backbone)
    assert found.figures["miou"] >= 0
    assert found.notes["readout"] == READOUTS[head]
    assert reader.backbone.readout == "plain"


def test_the_students_head_is_the_one_it_was_trained_with(reader, pictures):
    def found(head):
        return run(reader, str(pictures), Settings(**WHOLE, head=head), seed=0)

    assert found("student") == found("plain")
    plain = found("plain")
    reader.backbone.trained_readout = "value-only"
    student, again = found("student"), found("plain")
    reader.backbone.trained_readout = "plain"
    assert student == found("maskclip")
    assert again == plain, "the other heads stay what they are called"
    assert student.figures != plain.figures


def test_it_is_measured_in_8_bits_too_where_that_is_asked_for(reader, pictures):
    settings = quantised.Settings(
        measured="zero-shot-segmentation", zero_shot_segmentation=Settings(**WHOLE, head="plain")
    )
    found = quantised.run(reader, str(pictures), settings, seed=0)
    full = run(reader, str(pictures), Settings(**WHOLE, head="plain"), seed=0).figures
    assert list(found.figures) == ["int8_miou", "miou", "lost_miou"]
    assert found.detail["full"] == full
    assert found.detail["int8"]["pearson"] != full["pearson"]
    assert found.figures["lost_miou"] == pytest.approx(full["miou"] - found.detail["int8"]["miou"])
    assert ("lost_miou", "lower") in [(spec.name, spec.better) for spec in quantised.METRICS]


def test_windows_that_see_the_whole_give_what_the_whole_gives(reader, pictures):
    once = run(reader, str(pictures), Settings(**WHOLE), seed=0)
    windows = WHOLE | {"reading": FeatureConfig(size=32, window=32, stride=8)}
    assert run(reader, str(pictures), Settings(**windows), seed=0).figures == once.figures


def test_maps_correlate_only_where_an_image_shows_something_else_too(reader, pictures):
    whole = np.zeros((32, 32), dtype=np.uint8)
    path = pictures / "masks" / "val"
    Image.fromarray(whole).save(path / "0.png")
    both = run(reader, str(pictures), Settings(**WHOLE, head="plain"), seed=0)
    shown = len(np.unique(np.array(Image.open(path / "1.png"))))
    assert both.counts["pearson"] == {"pairs": shown, "images": 1, "classes": shown}
    Image.fromarray(whole + 1).save(path / "1.png")
    none = run(reader, str(pictures), Settings(**WHOLE, head="plain"), seed=0)
    assert "pearson" not in none.figures
    assert "no image shows" in none.notes["left_out"]["pearson"]


def test_a_siglip_takes_the_plain_head_alone(pictures, tmp_path):
    reader = FeatureReader(
        adapt(families_transformers.FAMILIES["siglip"]()), "siglip", FeatureCache(tmp_path / "cache")
    )
    with pytest.raises(PhregError, match="at plain"):
        run(reader, str(pictures), Settings(**WHOLE, head="maskclip"), seed=0)


def test_a_model_without_text_is_refused(tiny, pictures, tmp_path):
    reader = FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"))
    with pytest.raises(PhregError, match="no text tower"):
        run(reader, str(pictures), Settings(**WHOLE, head="plain"), seed=0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_are_settings(protocol):
    assert resolve_settings("zero-shot-segmentation", {}, protocol).reading.stride == 112


def test_naclip_reads_vocs_pictures_whole_and_others_through_windows(reader, clip, pictures, monkeypatch):
    asked = []

    def note(_reader, test, reading, *_args, **_kwargs):
        asked.append((test.layout, reading.window, reading.fit))
        raise StopIteration

    monkeypatch.setattr("phreg.evaluation.tasks.zero_shot_segmentation.measure_segmentation", note)
    settings = resolve_settings("zero-shot-segmentation", {"template": "a {}"}, "naclip")
    others = resolve_settings(
        "zero-shot-segmentation", {"template": "a {}", "whole_layouts": ("folder",)}, "naclip"
    )
    for each in (settings, others):
        with pytest.raises(StopIteration):
            run(reader, str(pictures), each, seed=0)
    assert asked == [("folder", 224, "centred"), ("folder", None, "keep")]
    assert settings.whole_layouts == ("voc20", "voc21")


def test_a_protocol_reads_windows_of_any_pixel_and_agrees_with_whole_pictures_where_one_window_covers_them(
    reader, pictures
):
    small = {"template": "a {}", "threshold": 0.0, "reading.stride": 9, "whole_layouts": ()}
    one = {"reading.size": 32, "reading.window": 32}
    naclip = resolve_settings("zero-shot-segmentation", small | one, "naclip")
    whole = Settings(**WHOLE | {"threshold": 0.0})
    assert run(reader, str(pictures), naclip, 0).figures == run(reader, str(pictures), whole, 0).figures
    several = resolve_settings(
        "zero-shot-segmentation", small | {"reading.size": 44, "reading.window": 32}, "naclip"
    )
    found = run(reader, str(pictures), several, 0)
    assert found.counts["miou"]["pixels"] == 2 * 32 * 32
    assert found.figures != run(reader, str(pictures), whole, 0).figures


def test_what_each_picture_adds_makes_up_the_figures(reader, pictures, whole_sample):
    found = run(reader, str(pictures), Settings(**WHOLE), seed=0)
    whole_sample(found, "miou", "mean_accuracy", "pixel_accuracy")
