import json

import numpy as np
import pytest
import torch
from PIL import Image

import phreg
from phreg.backbones.resolve import adapt, load
from phreg.evaluation.dense import Placement
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.metrics.scores import is_localised
from phreg.evaluation.tasks import object_discovery
from phreg.evaluation.tasks.lost import lost
from phreg.evaluation.tasks.object_discovery import Combination, Settings, box_in_picture, sweep
from phreg.evaluation.tasks.table import resolve_settings

SMALL = Settings(sources=("keys", "values"), layers=(-1, -2), biases=(0.0, -0.5))


@pytest.fixture
def squares(tmp_path):
    """Grey pictures with a bright square on whole 8-pixel patches, at other places, of other sizes."""
    for kind in ("images", "masks"):
        (tmp_path / "squares" / kind).mkdir(parents=True)
    for number, (top, left) in enumerate([(0, 8), (8, 8), (16, 0)]):
        inside = np.zeros((32 + 8 * number, 32), dtype=np.uint8)
        inside[top : top + 16, left : left + 16] = 1
        picture = np.where(inside[..., None], (250, 220, 40), (60, 60, 70)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "squares" / "images" / f"{number}.png")
        Image.fromarray(255 * inside).save(tmp_path / "squares" / "masks" / f"{number}.png")
    return str(tmp_path / "squares")


@pytest.fixture
def reader(tiny, tmp_path):
    return FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"), batch_size=2)


def test_every_combination_is_recorded_and_the_best_is_the_headline(reader, squares):
    found = object_discovery.run(reader, squares, SMALL, seed=0)
    swept = found.detail["corloc"]
    assert list(swept) == [
        f"{source} of block {layer}, bias {bias}"
        for layer in (-1, -2)
        for source in ("keys", "values")
        for bias in ("0", "-0.5")
    ]
    assert next(iter(found.figures)) == "corloc"
    assert found.figures["corloc"] == max(swept.values()) == swept[found.notes["best"]]
    assert found.figures["corloc_first"] == swept["keys of block -1, bias 0"]
    assert found.notes["pictures"] == 3
    assert found.counts == {key: {"images": 3, "boxes": 3} for key in ("corloc", "corloc_first")}
    assert found.notes["sweep"] == "corloc", "by which it is told"


def test_corloc_is_the_share_of_pictures_whose_box_hits(reader, squares, monkeypatch):
    # Rows 0-1 and columns 1-2 whatever is shown: all of the first square, half of the second (IoU 1/3).
    fixed = lost(torch.randn(4, 4, 3))._replace(box=(1, 0, 3, 2))
    monkeypatch.setattr(object_discovery, "discover", lambda *_: fixed)
    found = object_discovery.run(reader, squares, SMALL, seed=0)
    assert found.figures["corloc"] == pytest.approx(1 / 3)
    assert found.notes["standard_error"] == pytest.approx((2 / 27) ** 0.5)


def test_a_model_of_patches_alone_finds_what_differs(reader, squares):
    # Blocks changed to pass their input on, so that tokens are patch embeddings, alike for one colour.
    with torch.no_grad():
        reader.backbone.model.pos_embed.zero_()
        for block in reader.backbone.model.blocks:
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()
    for algorithm in ("lost", "tokencut"):
        settings = Settings(algorithm=algorithm, sources=("tokens",), layers=(-1,), tau=0.99, biases=(-0.99,))
        assert object_discovery.run(reader, squares, settings, seed=0).figures["corloc"] == 1


def test_the_sweep_gives_what_each_combination_gives_alone(reader, squares):
    swept = object_discovery.run(reader, squares, SMALL, seed=0).detail["corloc"]
    for combination in sweep(SMALL):
        alone = Settings(
            sources=(combination.source,), layers=(combination.layer,), biases=(combination.bias,)
        )
        assert object_discovery.run(reader, squares, alone, 0).detail["corloc"] == {
            str(combination): swept[str(combination)]
        }


def test_seeds_at_the_baselines_artifacts_are_counted(reader, squares, monkeypatch):
    fixed = lost(torch.randn(4, 4, 3))._replace(seed=(1, 2))
    monkeypatch.setattr(object_discovery, "discover", lambda *_: fixed)
    # Marks on a grid twice as fine: the middle of patch (1, 2) of 4x4 lies in (3, 5) of 8x8.
    places = torch.zeros(3, 8, 8, dtype=torch.bool)
    places[1, 3, 5] = places[2, 1, 2] = True
    monkeypatch.setattr(object_discovery, "artifact_places", lambda *_: list(places))
    found = object_discovery.run(reader, squares, SMALL, seed=0)
    assert found.figures["artifact_seeds"] == pytest.approx(1 / 3)
    assert found.counts["artifact_seeds"] == {"images": 3}


def test_fewer_pictures_are_drawn_by_the_seed(reader, squares, monkeypatch):
    drawn = []
    search = object_discovery._search
    monkeypatch.setattr(object_discovery, "_search", lambda *words: drawn.append(words[2]) or search(*words))
    few = SMALL.model_copy(update={"count": 2})
    for seed in (0, 0, 1, 2, 3):
        assert object_discovery.run(reader, squares, few, seed).notes["pictures"] == 2
    assert drawn[0] == drawn[1]
    assert len({tuple(chosen) for chosen in drawn}) > 1


def test_tokencut_has_no_bias_to_sweep():
    settings = resolve_settings("object-discovery", {"layers": "-1"}, "tokencut")
    assert list(sweep(settings)) == [Combination("keys", -1, None)]
    assert str(Combination("keys", -1, None)) == "keys of block -1"


def test_the_sweep_can_be_set_from_the_command_line():
    settings = resolve_settings("object-discovery", {"biases": "-0.5,0", "sources": "values"})
    assert (settings.biases, settings.sources) == ((-0.5, 0), ("values",))
    assert not resolve_settings("object-discovery", {}, "lost").reading.unit


def test_a_box_is_laid_onto_the_picture_and_cut_off_at_the_padding(reader):
    # 30x20 pixels shown at twice the size on 64x40, i.e. 8x5 patches of 8 pixels, the last 4 columns padding.
    placement = Placement((20, 30), (40, 64), (0, 0, 40, 60), (0, 0, 20, 30))
    assert box_in_picture((1, 2, 8, 5), (5, 8), placement).tolist() == [4, 8, 30, 20]
    # A central square of 20 pixels at its own size begins 5 pixels into the picture.
    cropped = Placement((20, 30), (20, 20), (0, 0, 20, 20), (0, 5, 20, 20))
    assert box_in_picture((0, 1, 2, 3), (4, 4), cropped).tolist() == [5, 5, 15, 15]


@pytest.mark.parametrize("algorithm", ["lost", "tokencut"])
def test_examples_are_what_the_best_combination_found_in_the_first_pictures(reader, squares, algorithm):
    settings = SMALL.model_copy(update={"algorithm": algorithm})
    found = object_discovery.run(reader, squares, settings, seed=0)
    every = object_discovery.examples(reader, squares, settings, 0, found.notes)
    pictures = [example[0] for example in every]
    truths, boxes = (
        [torch.stack([box.sides for box in picture.boxes if box.found is side]) for picture in pictures]
        for side in (False, True)
    )
    hits = [is_localised(box[0], truth) for box, truth in zip(boxes, truths, strict=True)]
    assert sum(hits) / 3 == pytest.approx(found.figures["corloc"])
    assert [picture.image.shape for picture in pictures] == [(32, 32, 3), (40, 32, 3), (48, 32, 3)]
    assert truths[1].tolist() == [[8, 8, 24, 24]]
    assert len(object_discovery.examples(reader, squares, settings, 0, found.notes, count=2)) == 2


def test_the_maps_of_an_example_lead_to_its_box_from_the_marked_patch(reader, squares):
    found = object_discovery.run(reader, squares, SMALL, seed=0)
    for _, *maps in object_discovery.examples(reader, squares, SMALL, 0, found.notes):
        assert [panel.title for panel in maps] == ["degree", "expansion", "similarity"]
        (row, col, _), *others = (mark for panel in maps for mark in panel.marks)
        assert {mark[:2] for mark in others} == {(row, col)}, "the same patch in each"
        assert maps[0].image[row, col] == maps[0].image.min(), "LOST starts where the degree is lowest"


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_an_evaluation_draws_how_each_model_found_its_boxes(saved, tiny, squares, tmp_path):
    asked = {"task": "object-discovery", "data": squares, "device": "cpu", "sources": "keys", "layers": "-1"}
    phreg.evaluate(saved, tiny(), output=tmp_path / "out", **asked)
    drawn = size_of(tmp_path / "out" / "maps.png")
    (tmp_path / "out" / "maps.png").unlink()
    phreg.evaluate(saved, output=tmp_path / "out", **asked)
    alone = size_of(tmp_path / "out" / "maps.png")
    assert drawn[1] == alone[1]
    assert drawn[0] == pytest.approx(2 * alone[0], abs=1), "models stand side by side, in whole pixels"


@pytest.mark.real
def test_photographs_of_salient_objects_are_searched(real_data, real_model, tmp_path):
    reader = FeatureReader(load(real_model)[0].eval(), "real", FeatureCache(tmp_path))
    few = {"count": 4, "reading": FeatureConfig(fit="pad", unit=True, size=160)}
    found = object_discovery.run(reader, str(real_data / "ecssd"), Settings(**few), seed=0)
    assert len(found.detail["corloc"]) == 4 * 3 * 4
    assert found.figures["corloc"] >= 0.5  # the best of 48 on four pictures with one large object each
    cut = Settings(**few, algorithm="tokencut", sources=("keys",), layers=(-1,))
    assert 0 <= object_discovery.run(reader, str(real_data / "ecssd"), cut, seed=0).figures["corloc"] <= 1


@pytest.mark.parametrize(("kind", "orientation"), [("voc", 6), ("coco", 8)])
def test_an_object_is_found_in_its_box_though_exif_turns_the_picture(
    reader, tmp_path, monkeypatch, kind, orientation
):
    # Annotated as it is stored, 48x32 pixels: the object in the two patches at the right of the top row.
    stored, box = np.full((32, 48, 3), 60, dtype=np.uint8), (32, 0, 48, 8)
    stored[box[1] : box[3], box[0] : box[2]] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    name = "COCO_train2014_000000000001.png" if kind == "coco" else "1.jpg"
    folder = tmp_path / ("train2014" if kind == "coco" else "JPEGImages")
    folder.mkdir()
    Image.fromarray(stored).save(folder / name, exif=exif, **({"quality": 100} if kind == "voc" else {}))
    if kind == "voc":
        sides = dict(zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, *box[2:]), strict=True))
        bounds = "".join(f"<{side}>{at}</{side}>" for side, at in sides.items())
        (tmp_path / "Annotations").mkdir()
        (tmp_path / "Annotations" / "1.xml").write_text(
            "<annotation><size><width>48</width><height>32</height></size>"
            f"<object><bndbox>{bounds}</bndbox></object></annotation>"
        )
        (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
        (tmp_path / "ImageSets" / "Main" / "trainval.txt").write_text("1\n")
    else:
        (tmp_path / "annotations").mkdir()
        things = [{"image_id": 1, "bbox": [32, 0, 16, 8]}]
        images = [{"id": 1, "file_name": name, "width": 48, "height": 32}]
        (tmp_path / "annotations" / "instances_train2014.json").write_text(
            json.dumps({"images": images, "annotations": things})
        )
        (tmp_path / "coco_20k_filenames.txt").write_text(f"train2014/{name}\n")
    pictures = []

    def brightest(grid, *_):
        """Finds the bright patches of the picture that was read, wherever they lie on the grid."""
        seen = pictures[-1].reshape(grid.shape[0], 8, grid.shape[1], 8, 3).mean((1, 3, 4))
        rows, cols = (places.tolist() for places in np.nonzero(seen > 200))
        return lost(grid)._replace(box=(min(cols), min(rows), max(cols) + 1, max(rows) + 1))

    place = FeatureReader.place

    def watched(self, picture, reading):
        pictures.append(np.asarray(picture))
        return place(self, picture, reading)

    monkeypatch.setattr(FeatureReader, "place", watched)
    monkeypatch.setattr(object_discovery, "discover", brightest)
    found = object_discovery.run(reader, str(tmp_path), SMALL, seed=0)
    assert found.figures["corloc"] == 1


def test_what_each_picture_adds_makes_up_the_figures(reader, squares, whole_sample, monkeypatch):
    monkeypatch.setattr(
        object_discovery,
        "artifact_places",
        lambda *_: [torch.eye(8) > 0, torch.eye(8) == 0, torch.eye(8) > 0],
    )
    whole_sample(
        object_discovery.run(reader, squares, SMALL, seed=0), "corloc", "corloc_first", "artifact_seeds"
    )
