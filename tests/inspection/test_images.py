"""Which images a model is looked at with."""

import logging

import pytest
import torch
from families import FAMILIES
from PIL import Image

from phreg.backbones.resolve import adapt
from phreg.data.crops import MEASURED_AT_ONCE
from phreg.data.sources import open_images
from phreg.errors import DataError
from phreg.inspection import images as reading
from phreg.inspection.images import labelled, larger


@pytest.fixture
def backbone():
    return adapt(FAMILIES["timm/vit"]())


@pytest.fixture
def classes(tmp_path):
    """Two classes of three pictures each, dark ones and bright ones."""
    for name, shade in (("dark", 0), ("light", 250)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 30), (shade + number,) * 3).save(
                tmp_path / "classes" / name / f"{number}.png"
            )
    return tmp_path / "classes"


def test_larger_images_are_half_as_large_again_and_few(backbone, photos):
    (batch,) = larger(backbone, open_images(str(photos)))
    assert batch.shape[1:] == (3, 48, 48)
    assert 1 <= len(batch) <= MEASURED_AT_ONCE
    backbone.check_size((48, 48))


def test_larger_images_hold_whole_patches(photos):
    backbone = adapt(FAMILIES["timm/dinov2"]())  # 56 pixels, patches of 14
    (batch,) = larger(backbone, open_images(str(photos)))
    assert batch.shape[-1] == 84


def test_larger_images_have_the_models_own_shape(tiny, photos):
    (batch,) = larger(adapt(tiny(img_size=(16, 64))), open_images(str(photos)))
    assert batch.shape[1:] == (3, 24, 96)


def test_a_model_of_fixed_size_is_shown_none(photos):
    backbone = adapt(FAMILIES["transformers/aimv2-vision"]())
    fixed = [adapt(build()) for name, build in FAMILIES.items() if name.startswith("transformers/siglip-vis")]
    for model in [backbone, *fixed]:
        assert bool(larger(model, open_images(str(photos)))) == model.spec.any_size


def test_labelled_images_are_normalised_and_keep_their_classes(backbone, classes):
    found = labelled(backbone, str(classes), 32)
    assert found.classes.tolist() == [0, 0, 0, 1, 1, 1]
    images = torch.cat(list(found.batches))
    assert images.shape == (6, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.spec.mean, backbone.spec.std))
    pixels = 255 * (images * std + mean)
    assert pixels[:, 0, 0, 0].round().tolist() == [0, 1, 2, 250, 251, 252]


def test_of_many_labelled_images_some_are_taken_evenly(backbone, classes, monkeypatch):
    monkeypatch.setattr(reading, "LABELLED", 3)
    assert labelled(backbone, str(classes), 32).classes.tolist() == [0, 0, 1]
    monkeypatch.setattr(reading, "LABELLED", 4)
    assert labelled(backbone, str(classes), 32).classes.tolist() == [0, 0, 1, 1]  # numbers 0, 1, 3 and 4


def test_an_unreadable_labelled_image_is_replaced_with_the_class_of_its_replacement(
    backbone, classes, caplog
):
    (classes / "dark" / "2.png").write_text("not an image")
    with caplog.at_level(logging.WARNING):
        found = labelled(backbone, str(classes), 32)
    assert found.classes.tolist() == [0, 0, 1, 1, 1, 1]


def test_a_folder_without_classes_is_refused(backbone, photos):
    with pytest.raises(DataError):
        labelled(backbone, str(photos), 32)
