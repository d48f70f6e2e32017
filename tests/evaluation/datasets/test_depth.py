import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from phreg.errors import DataError
from phreg.evaluation.datasets.depth import open_depths
from phreg.evaluation.feature_cache import stamps

SIZE = (480, 640)


def write_pair(image, depth, metres=2.0, size=SIZE):
    """Writes a grey image, and depths in millimetres."""
    image.parent.mkdir(parents=True, exist_ok=True)
    depth.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], "grey").save(image)
    Image.fromarray(np.full(size, round(1000 * metres), dtype=np.uint16)).save(depth)


@pytest.fixture
def bts(tmp_path):
    for folder, scene, number in (
        ("sync", "cafe", 1),
        ("sync", "attic", 2),
        ("official_splits/test", "bath", 3),
    ):
        scene = tmp_path / folder / scene
        write_pair(scene / f"rgb_{number:05}.jpg", scene / f"sync_depth_{number:05}.png", metres=number)
    return tmp_path


def test_bts_folders_are_paired_by_number_and_read_in_millimetres(bts):
    train, test = open_depths(bts, "train"), open_depths(bts, "val")
    assert [path.split("/")[-2] for path in train.images.paths] == ["attic", "cafe"]
    assert len(test) == 1
    depth = test.depth(0, SIZE)
    assert depth[45, 41] == depth[470, 600] == 3
    # Eigen's crop: nothing counts outside of it.
    assert depth.count_nonzero() == 426 * 560
    assert depth[44, 100] == depth[471, 100] == depth[100, 40] == depth[100, 601] == 0


def test_copies_of_notebooks_are_no_pictures_and_linked_scenes_are_read(bts, tmp_path):
    cafe = bts / "sync" / "cafe"
    (cafe / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", SIZE[::-1]).save(cafe / ".ipynb_checkpoints" / "rgb_00001-checkpoint.jpg")
    cafe.rename(tmp_path / "elsewhere")
    cafe.symlink_to(tmp_path / "elsewhere")
    train = open_depths(bts, "train")
    assert [path.split("/")[-2:] for path in train.images.paths] == [
        ["attic", "rgb_00002.jpg"],
        ["cafe", "rgb_00001.jpg"],
    ]


@pytest.mark.parametrize("prefix", ["", "/", "sync/"])
def test_a_list_of_pairs_is_followed_from_the_split_or_the_root(bts, prefix):
    (bts / "nyu_train.txt").write_text(
        f"{prefix}cafe/rgb_00001.jpg {prefix}cafe/sync_depth_00001.png 518.8579\n"
    )
    train = open_depths(bts, "train")
    assert len(train) == 1
    assert train.depth(0, SIZE)[100, 100] == 1


def test_the_labelled_file_is_read_in_metres_with_rows_before_columns(tmp_path):
    values = np.arange(3 * 3 * 640 * 480, dtype=np.int64).reshape(3, 3, 640, 480) % 251
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = values.astype(np.uint8)
        file["depths"] = np.stack([np.full((640, 480), metres, dtype=np.float32) for metres in (1, 2, 3)])
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1], [3]]), "testNdxs": np.array([[2]])})
    train, test = open_depths(tmp_path, "train"), open_depths(tmp_path, "val")
    assert (len(train), len(test)) == (2, 1)
    assert "795 to train on" in test.remark
    assert train.depth(1, SIZE)[200, 200] == 3
    picture = np.asarray(train.images.read(1))
    assert picture.shape == (*SIZE, 3)
    assert picture[5, 7].tolist() == values[2, :, 7, 5].tolist()
    assert train.images.name(1).endswith("[2]")
    assert len(set(stamps(train.images))) == 2, "features of each can be kept"


def test_the_labelled_file_needs_its_splits(tmp_path):
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"")
    with pytest.raises(DataError, match=r"splits\.mat is missing"):
        open_depths(tmp_path, "val")


def test_a_folder_of_ones_own_has_a_unit_of_its_own(tmp_path):
    write_pair(tmp_path / "images/val/a.png", tmp_path / "depths/val/a.png", 2.5, (20, 30))
    assert open_depths(tmp_path, "val").depth(0, (20, 30)).unique().tolist() == [2.5]
    assert open_depths(tmp_path, "val", unit=0.01).depth(0, (20, 30)).unique().tolist() == [25]


def test_arrays_are_in_metres_and_what_is_not_finite_is_unknown(tmp_path):
    write_pair(tmp_path / "images/val/a.png", tmp_path / "depths/val/a.png", size=(2, 3))
    (tmp_path / "depths/val/a.png").unlink()
    np.save(tmp_path / "depths/val/a.npy", np.array([[1, np.nan, np.inf], [-1, 0, 4]]))
    depth = open_depths(tmp_path, "val").depth(0, (2, 3))
    assert depth.tolist() == [[1, 0, 0], [0, 0, 4]]


def test_usual_mistakes_are_errors_that_name_the_file(tmp_path, bts):
    with pytest.raises(DataError, match="no such folder"):
        open_depths(tmp_path / "nowhere", "val")
    with pytest.raises(DataError, match="nyu-folders, folder"):
        open_depths(bts, "val", layout="kitti")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no known layout"):
        open_depths(tmp_path / "empty", "val")
    mine = tmp_path / "mine"
    write_pair(mine / "images/val/a.png", mine / "depths/val/b.png", size=(4, 6))
    with pytest.raises(DataError, match=r"a\.png"):
        open_depths(mine, "val")
    with pytest.raises(DataError, match="no train split"):
        open_depths(mine, "train")
    Image.new("RGB", (6, 4)).save(mine / "depths/val/a.png")
    with pytest.raises(DataError, match="coloured map"):
        open_depths(mine, "val").depth(0, (4, 6))
    with pytest.raises(DataError, match="measure 640x480"):
        open_depths(bts, "val").depth(0, (240, 320))
    test = bts / "official_splits/test/bath"
    (test / "sync_depth_00003.png").write_bytes(b"half")
    with pytest.raises(DataError, match="cannot read depths"):
        open_depths(bts, "val").depth(0, SIZE)
    (test / "sync_depth_00003.png").unlink()
    with pytest.raises(DataError, match="1 files of which are missing"):
        open_depths(bts, "val")


def test_pictures_of_ones_own_are_found_at_all_levels_and_turned_as_their_depths(tmp_path):
    write_pair(tmp_path / "images/val/den/a.png", tmp_path / "depths/val/den/a.png", size=(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), "grey").save(tmp_path / "images/val/den/a.png", exif=exif)
    found = open_depths(tmp_path, "val")
    assert found.images.read(0).size == (6, 4)
    assert found.depth(0, (4, 6))[0, 0] == 2
    exif[0x0112] = 3
    Image.new("RGB", (6, 4), "grey").save(tmp_path / "images/val/den/a.png", exif=exif)
    with pytest.raises(DataError, match=r"EXIF says .*den/a\.png"):
        open_depths(tmp_path, "val")


@pytest.mark.parametrize(("text", "named"), [(b"rgb_1.jpg\n", "no depths"), (b"caf\xe9 a b\n", "UTF-8")])
def test_a_broken_list_of_pairs_is_named(bts, text, named):
    (bts / "nyu_train.txt").write_bytes(text)
    with pytest.raises(DataError, match=rf"nyu_train\.txt.*{named}"):
        open_depths(bts, "train")


def write_depths(path, values, size=(4, 6), mode=None):
    """Writes a picture beside depths of one value, in the file's own type."""
    image = path.parents[2] / "images" / path.parent.name / f"{path.stem}.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], "grey").save(image)
    full = np.full(size, values)
    if path.suffix == ".npy":
        np.save(path, full)
    else:
        depths = Image.fromarray(full)
        if mode == "P":
            depths = depths.convert("P")
            depths.putpalette([part for shade in range(256) for part in (shade, 0, 255 - shade)])
        depths.save(path)


def test_each_file_tells_its_own_unit(tmp_path):
    write_depths(tmp_path / "depths/val/a.npy", np.float32(2.5))
    write_depths(tmp_path / "depths/val/b.png", np.uint16(1500))
    write_depths(tmp_path / "depths/val/c.npy", np.float64(4))
    found = open_depths(tmp_path, "val")
    assert [found.depth(number, (4, 6)).unique().tolist() for number in range(3)] == [[2.5], [1.5], [4]]


CANNOT_TELL = {
    "grey.png": np.uint8(200),
    "scan.tif": np.uint16(1500),
    "metres.tif": np.float32(1.5),
    "steps.npy": np.uint16(1500),
}


@pytest.mark.parametrize("name", CANNOT_TELL)
def test_a_file_that_cannot_tell_its_unit_is_refused_without_one(tmp_path, name):
    write_depths(tmp_path / "depths/val/a.npy", np.float32(2.5))
    write_depths(tmp_path / "depths/val" / name, CANNOT_TELL[name])
    with pytest.raises(DataError, match=rf"unit .* 1 of 2 .*{name}.*set unit"):
        open_depths(tmp_path, "val")
    found = open_depths(tmp_path, "val", unit=0.01)
    number = next(number for number, path in enumerate(found.names) if path.endswith(name))
    assert found.depth(number, (4, 6)).unique().tolist() == pytest.approx([0.01 * CANNOT_TELL[name]])


@pytest.mark.parametrize("unit", [None, 0.01])
def test_numbers_of_colours_are_no_depths_with_or_without_a_unit(tmp_path, unit):
    write_depths(tmp_path / "depths/val/a.png", np.uint8(3), mode="P")
    with pytest.raises(DataError, match=r"a\.png.*coloured map"):
        open_depths(tmp_path, "val", unit=unit).depth(0, (4, 6))


def test_nyus_8_bit_copies_do_not_pass_as_millimetres(bts):
    path = bts / "sync/cafe/sync_depth_00001.png"
    Image.fromarray(np.full(SIZE, 77, dtype=np.uint8)).save(path)
    with pytest.raises(DataError, match=r"unit .*sync_depth_00001\.png"):
        open_depths(bts, "train")
    assert len(open_depths(bts, "val")) == 1
