import json
import logging
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from pictures import leave_copies, noise, write
from PIL import Image

from phreg.backbones.resolve import adapt
from phreg.errors import DataError
from phreg.evaluation.datasets import labelled
from phreg.evaluation.datasets.labelled import open_labelled, open_split, read_labelled


@pytest.fixture
def class_folders(tmp_path):
    for split in ("train", "val"):
        for name in ("dog", "cat"):
            for number in range(3):
                write(tmp_path / "set" / split / name / f"{number}.png", noise())
    return tmp_path / "set"


def test_class_folders_are_numbered_in_the_order_of_their_names(class_folders):
    found = open_split(class_folders, "train")
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "train/cat" in found.images.name(0)


def test_a_folder_without_splits_is_one_set(class_folders):
    assert open_split(class_folders / "train", "val") is None
    assert len(open_labelled(class_folders / "train").labels) == 6


def test_a_class_without_images_is_named(class_folders):
    (class_folders / "train" / "eel").mkdir()
    with pytest.raises(DataError, match="eel"):
        open_split(class_folders, "train")


def test_hidden_files_are_no_images_of_a_class(class_folders):
    leave_copies(class_folders / "train" / "dog" / "0.png")
    found = open_split(class_folders, "train")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [found.images.read(number).size for number in range(6)] == [(40, 30)] * 6


def test_linked_folders_of_a_class_are_read(class_folders, tmp_path):
    write(tmp_path / "elsewhere" / "9.png", noise())
    (class_folders / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    assert open_split(class_folders, "train").labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_links_to_nothing_are_named(class_folders, tmp_path):
    (class_folders / "train" / "cat" / "9.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"1 of 7 images of .*cat/9\.png"):
        open_split(class_folders, "train")


@pytest.mark.parametrize("heading", ["", "file,class\n"])
def test_a_file_of_labels_numbers_a_flat_folder(tmp_path, heading):
    for number in range(3):
        write(tmp_path / f"{number}.png", noise())
    (tmp_path / "labels.csv").write_text(heading + "0.png,7\n1.png,2\n2.png,7\n")
    found = open_labelled(tmp_path)
    assert found.labels.tolist() == [7, 2, 7]
    assert open_split(tmp_path, "val") is None
    (tmp_path / "other.json").write_text(json.dumps({"2.png": "dog", "0.png": "cat"}))
    named = open_labelled(tmp_path, labels=tmp_path / "other.json")
    assert (named.classes, named.labels.tolist()) == (("cat", "dog"), [1, 0])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["labels.csv", "labels.json"])
def test_labels_may_be_of_any_unicode_and_name_files_by_anything(tmp_path, encoding, name):
    for file in ("#1.png", "IMG 1.png"):
        write(tmp_path / file, noise())
    table = {"#1.png": "dog", "IMG 1.png": "cat"}
    lines = "".join(f"{file},{label}\r\n" for file, label in table.items())
    (tmp_path / name).write_bytes((json.dumps(table) if name.endswith("json") else lines).encode(encoding))
    found = open_labelled(tmp_path)
    assert [Path(path).name for path in found.images.paths] == ["#1.png", "IMG 1.png"]
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [1, 0])


def test_labels_of_images_that_are_not_there_are_named(tmp_path):
    write(tmp_path / "0.png", noise())
    (tmp_path / "labels.csv").write_text("0.png,1\n9.png,2\n")
    with pytest.raises(DataError, match=r"9\.png"):
        open_labelled(tmp_path)


@pytest.mark.parametrize("text", ["0.png\n", "", "{"])
def test_broken_labels_are_refused(tmp_path, text):
    write(tmp_path / "0.png", noise())
    path = tmp_path / ("labels.json" if text == "{" else "labels.csv")
    path.write_text(text)
    with pytest.raises(DataError, match="labels"):
        open_labelled(tmp_path)


def test_a_saved_dataset_brings_its_own_classes(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [noise(seed=number) for number in range(4)], "label": [0, 1, 1, 0]}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    found = open_split(tmp_path / "saved", "val")
    assert (found.classes, found.labels.tolist()) == (("a", "b"), [0, 1, 1, 0])
    assert found.images.read(0).size == (40, 30)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_split_that_stands_alone_is_no_class(class_folders, split):
    (class_folders / "train").rename(class_folders / "dogs")
    (class_folders / "val").rename(class_folders / split)
    with pytest.raises(DataError, match=rf"found {split}, which names a part"):
        open_labelled(class_folders)


def test_splits_of_one_set_are_not_its_classes(class_folders):
    with pytest.raises(DataError, match="found train, val"):
        open_labelled(class_folders)


def test_a_single_class_folder_is_refused(tmp_path):
    write(tmp_path / "dog" / "0.png", noise())
    with pytest.raises(DataError, match="found one folder, dog"):
        open_labelled(tmp_path)


def test_a_folder_that_holds_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="no classes"):
        open_labelled(tmp_path)


# -- as a model takes them


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


def test_labelled_images_are_normalised_and_keep_their_classes(backbone, classes):
    found = read_labelled(backbone, str(classes), 32)
    assert found.classes.tolist() == [0, 0, 0, 1, 1, 1]
    images = torch.cat(list(found.batches))
    assert images.shape == (6, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.spec.mean, backbone.spec.std))
    pixels = 255 * (images * std + mean)
    assert pixels[:, 0, 0, 0].round().tolist() == [0, 1, 2, 250, 251, 252]


def test_of_many_labelled_images_some_are_taken_evenly(backbone, classes, monkeypatch):
    monkeypatch.setattr(labelled, "LABELLED", 3)
    assert read_labelled(backbone, str(classes), 32).classes.tolist() == [0, 0, 1]
    monkeypatch.setattr(labelled, "LABELLED", 4)
    assert read_labelled(backbone, str(classes), 32).classes.tolist() == [0, 0, 1, 1]  # numbers 0, 1, 3 and 4


def test_an_unreadable_labelled_image_is_replaced_with_the_class_of_its_replacement(
    backbone, classes, caplog
):
    (classes / "dark" / "2.png").write_text("not an image")
    with caplog.at_level(logging.WARNING):
        found = read_labelled(backbone, str(classes), 32)
    assert found.classes.tolist() == [0, 0, 1, 1, 1, 1]


def test_a_folder_without_classes_is_refused(backbone, photos):
    with pytest.raises(DataError):
        read_labelled(backbone, str(photos), 32)
