from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import leave_copies, noise, write
from PIL import Image

from phreg.errors import DataError
from phreg.evaluation.datasets.labelled import open_labelled, open_split
from phreg.evaluation.datasets.masks import class_shares, read_index_mask
from phreg.evaluation.datasets.segmentation import CAMVID, VOC, open_segmentation
from phreg.evaluation.metrics.scores import IGNORE


def index_mask(values=(0, 1, 255), size=(12, 8)):
    pixels = np.resize(np.array(values, dtype=np.uint8), (size[1], size[0]))
    return Image.fromarray(pixels)


@pytest.fixture
def own_folder(tmp_path):
    root = tmp_path / "own"
    for split in ("train", "val"):
        write(root / "images" / split / "a.jpg", noise((12, 8)))
        write(root / "masks" / split / "a.png", index_mask())
    (root / "classes.txt").write_text("road\ncar\n")
    return root


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for stem in ("2007_000032", "2007_000033"):
        write(root / "JPEGImages" / f"{stem}.jpg", noise((12, 8)))
        mask = index_mask((0, 1, 20, 255)).convert("P")
        mask.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
        write(root / "SegmentationClass" / f"{stem}.png", mask)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_text("2007_000033\n")
    return root


def test_an_own_folder_has_its_own_classes(own_folder):
    found = open_segmentation(own_folder, "val")
    assert found.classes == ("road", "car")
    assert found.mask(0, (8, 12)).unique().tolist() == [0, 1, IGNORE]
    assert found.picture(0).shape == (3, 8, 12)


def test_pictures_and_masks_are_found_at_all_levels(own_folder):
    write(own_folder / "images" / "val" / "day" / "b.png", noise((12, 8)))
    with pytest.raises(DataError, match=r"masks/val/day/b\.png"):
        open_segmentation(own_folder, "val")
    write(own_folder / "masks" / "val" / "day" / "b.png", index_mask())
    found = open_segmentation(own_folder, "val")
    assert [mask.split("/val/")[1] for mask in found.masks] == ["a.png", "day/b.png"]


def test_two_masks_of_one_name_are_refused(own_folder):
    write(own_folder / "masks" / "val" / "a.bmp", index_mask())
    with pytest.raises(DataError, match=r"'a': found a\.bmp and a\.png"):
        open_segmentation(own_folder, "val")


def test_a_picture_with_a_mask_is_never_read_at_a_reduced_size(own_folder):
    images = open_segmentation(own_folder, "val").images
    with pytest.raises(DataError, match=r"12x8.* where a mask, depths or boxes go with them"):
        replace(images, max_megapixels=12 * 8 / 1e6 - 1e-6).read(0)


@pytest.mark.parametrize("line", ["f0.5", "f0.5.jpg", "images/f0.5.jpg"])
def test_a_dot_in_a_name_is_no_suffix(tmp_path, line):
    write(tmp_path / "images" / "f0.5.jpg", noise((12, 8)))
    write(tmp_path / "masks" / "f0.5.png", index_mask())
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    (tmp_path / "val.txt").write_text(f"{line}\n")
    assert open_segmentation(tmp_path, "val").images.name(0).endswith("images/f0.5.jpg")


def test_a_list_may_name_pictures_in_folders(tmp_path):
    for folder in ("day", "night"):
        write(tmp_path / "images" / folder / "a.jpg", noise((12, 8)))
        write(tmp_path / "masks" / folder / "a.png", index_mask())
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    (tmp_path / "val.txt").write_text("night/a.jpg\n")
    found = open_segmentation(tmp_path, "val")
    assert len(found) == 1
    assert "night" in found.images.name(0)
    assert "night" in found.masks[0]


def write_listed(root, listing, stems):
    for number, stem in enumerate(stems):
        write(root / "images" / f"{stem}.jpg", noise((12 + number, 8)))
        write(root / "masks" / f"{stem}.png", index_mask(size=(12 + number, 8)))
    (root / "classes.txt").write_text("road\ncar\n")
    (root / "val.txt").write_bytes(listing)


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        (b"IMG 1.jpg\nIMG.jpg\n", ["IMG 1", "IMG"]),
        (b"IMG 1\nIMG\n", ["IMG 1", "IMG"]),
        (b"images/IMG 1.jpg\n", ["IMG 1"]),
        (b"/CamVid/val/IMG.jpg /CamVid/valannot/IMG.png\n", ["IMG"]),
        (b"IMG.jpg masks of mine/IMG.png\n", ["IMG"]),
        (b"IMG -1\n", ["IMG"]),
        (b"IMG  1\n", ["IMG"]),
        ("\ufeffIMG 1.jpg\r\nIMG\r\n".encode("utf-16-le"), ["IMG 1", "IMG"]),
    ],
)
def test_a_line_of_a_list_is_a_name_as_a_whole_or_a_name_and_columns(tmp_path, listing, expected):
    write_listed(tmp_path, listing, ["IMG", "IMG 1"])
    found = open_segmentation(tmp_path, "val")
    assert [Path(path).stem for path in found.images.paths] == expected
    assert [Path(path).stem for path in found.masks] == expected


@pytest.mark.parametrize("line", ["IMG 1.jpg", "IMG of mine", "IMG,1"])
def test_no_other_picture_stands_in_for_one_that_is_missing(tmp_path, line):
    write_listed(tmp_path, line.encode(), ["IMG"])
    with pytest.raises(DataError, match=rf"missing: .*images/{line.removesuffix('.jpg')}\.jpg"):
        open_segmentation(tmp_path, "val")


def test_voc_names_may_have_spaces(voc):
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (voc / folder / f"2007_000033.{suffix}").rename(voc / folder / f"IMG 1.{suffix}")
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("IMG 1\n2007_000032  1\n")
    found = open_segmentation(voc, "val")
    assert [Path(path).stem for path in found.images.paths] == ["IMG 1", "2007_000032"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_in_which_nothing_counts_are_refused_and_one_that_shows_a_class_will_do(own_folder, split):
    write(own_folder / "masks" / split / "a.png", index_mask((255,)))
    with pytest.raises(DataError, match=rf"none of the 1 masks of the {split} split"):
        open_segmentation(own_folder, split)
    write(own_folder / "images" / split / "b.jpg", noise((12, 8)))
    write(own_folder / "masks" / split / "b.png", index_mask())
    assert len(open_segmentation(own_folder, split)) == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_binary_masks_of_0_and_255_are_refused_as_their_foreground_would_not_count(own_folder, split):
    write(own_folder / "masks" / split / "a.png", index_mask((0, 255)))
    with pytest.raises(DataError, match=rf"{split} split .* never show car, .* 255, .*write the index 1"):
        open_segmentation(own_folder, split)


@pytest.mark.parametrize(
    ("values", "refused"), [((0, 1), False), ((0, 1, 255), True), ((0, 1, 2, 255), False)]
)
def test_a_listed_class_that_never_occurs_is_refused_where_255_does(own_folder, values, refused):
    (own_folder / "classes.txt").write_text("road\ncar\ntree\n")
    write(own_folder / "masks" / "val" / "a.png", index_mask(values))
    if refused:
        with pytest.raises(DataError, match=r"never show tree, .*ignore_index=255"):
            open_segmentation(own_folder, "val")
    else:
        assert len(open_segmentation(own_folder, "val")) == 1


def test_classes_may_occur_in_any_of_the_masks_of_a_split(own_folder):
    write(own_folder / "masks" / "val" / "a.png", index_mask((0, 255)))
    write(own_folder / "images" / "val" / "b.jpg", noise((12, 8)))
    write(own_folder / "masks" / "val" / "b.png", index_mask((1,)))
    assert len(open_segmentation(own_folder, "val")) == 2


def test_who_says_that_255_is_not_to_count_may_list_classes_that_never_occur(own_folder):
    (own_folder / "classes.txt").write_text("road\ncar\ntree\n")
    write(own_folder / "masks" / "val" / "a.png", index_mask((0, 1, 255)))
    found = open_segmentation(own_folder, "val", ignore_index=255)
    assert found.mask(0).unique().tolist() == [0, 1, IGNORE]


def test_another_index_than_255_may_stand_for_what_is_not_counted(own_folder):
    write(own_folder / "masks" / "val" / "a.png", index_mask((0, 1, 7)))
    found = open_segmentation(own_folder, "val", ignore_index=7)
    assert found.mask(0)[0, :3].tolist() == [0, 1, IGNORE]
    write(own_folder / "masks" / "val" / "a.png", index_mask((0, 1, 255)))
    with pytest.raises(DataError, match="has indices 255"):
        open_segmentation(own_folder, "val", ignore_index=7).mask(0)


def test_published_layouts_know_what_is_not_counted_but_take_no_binary_masks(voc):
    with pytest.raises(DataError, match=r"ignore_index=0 asked of .*, layout voc21"):
        open_segmentation(voc, "val", ignore_index=0)
    mask = voc / "SegmentationClass" / "2007_000033.png"
    write(mask, index_mask((0, 5, 255)))
    assert len(open_segmentation(voc, "val")) == 1, "few pictures need not show all classes"
    write(mask, index_mask((0, 255)))
    with pytest.raises(DataError, match="hold 0 and 255 alone"):
        open_segmentation(voc, "val")


def test_a_jpeg_is_no_mask(own_folder):
    (own_folder / "masks" / "val" / "a.png").unlink()
    write(own_folder / "masks" / "val" / "a.jpg", index_mask((0, 1)))
    with pytest.raises(DataError, match=r"a\.jpg is a JPEG"):
        open_segmentation(own_folder, "val")


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        (b"road\ncar\nroad\n", "found 3, 1 of them more than once: road"),
        (b"road\n", "found 1"),
        (b"Stra\xdfe\ncar\n", "text file of UTF-8"),
        ("\n".join(map(str, range(256))).encode(), "found 256, 0 of them"),
    ],
)
def test_a_class_list_that_cannot_be_meant_is_refused(own_folder, classes, named):
    (own_folder / "classes.txt").write_bytes(classes)
    with pytest.raises(DataError, match=rf"classes\.txt.*{named}"):
        open_segmentation(own_folder, "val")


def turned(path, orientation, size):
    """Writes a picture that EXIF says is to be turned, red at the top left as it is stored."""
    picture = noise(size)
    picture.paste((255, 0, 0), (0, 0, 2, 2))
    exif = picture.getexif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, exif=exif)


@pytest.mark.parametrize(("size", "corner"), [((12, 8), (0, 0)), ((8, 12), (0, -1))])
def test_a_picture_is_turned_by_exif_only_where_its_mask_is(own_folder, size, corner):
    (own_folder / "images" / "val" / "a.jpg").unlink()
    turned(own_folder / "images" / "val" / "a.png", 6, (12, 8))  # clockwise
    write(own_folder / "masks" / "val" / "a.png", index_mask((0, 1), size))
    found = open_segmentation(own_folder, "val")
    picture = found.picture(0)
    assert picture.shape == (3, size[1], size[0])
    assert picture[:, corner[0], corner[1]].tolist() == [255, 0, 0]
    assert found.mask(0, (size[1], size[0])).shape == (size[1], size[0])


@pytest.mark.parametrize(
    ("orientation", "size", "mask"),
    [(3, (12, 8), (12, 8)), (2, (12, 8), (12, 8)), (6, (8, 8), (8, 8)), (6, (12, 8), (24, 16))],
)
def test_a_picture_that_may_lie_two_ways_or_neither_is_refused(own_folder, orientation, size, mask):
    (own_folder / "images" / "val" / "a.jpg").unlink()
    turned(own_folder / "images" / "val" / "a.png", orientation, size)
    write(own_folder / "masks" / "val" / "a.png", index_mask((0, 1), mask))
    with pytest.raises(DataError, match=r"EXIF says of 1 of 1 images .*val/a\.png"):
        open_segmentation(own_folder, "val")


def test_camvid_is_known_by_its_sequences_and_its_void_is_not_counted(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "images" / split / "0001TP_1.jpg", noise((12, 8)))
        write(tmp_path / "masks" / split / "0001TP_1.png", index_mask((0, 10, 11)))
    found = open_segmentation(tmp_path, "train")
    assert found.classes == CAMVID
    assert found.mask(0).unique().tolist() == [0, 10, IGNORE]


@pytest.mark.parametrize("above", [0, 1])
def test_voc_palettes_are_read_as_indices(voc, above):
    found = open_segmentation([voc, voc.parent][above], "val")
    assert found.classes == VOC
    assert found.images.name(0).endswith("2007_000033.jpg")
    assert found.mask(0).unique().tolist() == [0, 1, 20, IGNORE]


def test_voc_without_background_numbers_from_the_first_object(voc):
    found = open_segmentation(voc, "val", layout="voc20")
    assert found.classes == VOC[1:]
    assert found.mask(0).unique().tolist() == [0, 19, IGNORE]


def test_ade20k_numbers_its_classes_from_one_and_brings_their_names(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        write(root / "images" / split / "ADE_1.jpg", noise((12, 8)))
        write(root / "annotations" / split / "ADE_1.png", index_mask((0, 1, 2)))
    heading = "Idx\tRatio\tTrain\tVal\tStuff\tName"
    (root / "objectInfo150.txt").write_text(f"{heading}\n1\t.1\t1\t1\t1\twall\n2\t.1\t1\t1\t1\tsofa, couch\n")
    found = open_segmentation(tmp_path, "val")
    assert found.classes == ("wall", "sofa")
    assert found.mask(0).unique().tolist() == [0, 1, IGNORE]
    assert "validation" in found.masks[0]
    (root / "objectInfo150.txt").unlink()
    with pytest.raises(DataError, match=r"objectInfo150\.txt"):
        open_segmentation(tmp_path, "val")


def test_cityscapes_counts_nineteen_of_its_labels(tmp_path):
    write(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_1_leftImg8bit.png", noise((12, 8)))
    mask = tmp_path / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_labelIds.png"
    write(mask, index_mask((0, 7, 9, 33)))
    found = open_segmentation(tmp_path, "val")
    assert len(found.classes) == 19
    assert found.mask(0).unique().tolist() == [0, 18, IGNORE]
    mask.unlink()
    with pytest.raises(DataError, match="ulm_1_gtFine_labelIds"):
        open_segmentation(tmp_path, "val")


@pytest.fixture
def context(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2010"
    for kind in ("SegmentationClass", "SegmentationClassContext"):
        write(root / kind / "2008_000002.png", index_mask((0, 1, 59)))
    write(root / "JPEGImages" / "2008_000002.jpg", noise((12, 8)))
    (root / "ImageSets" / "SegmentationContext").mkdir(parents=True)
    (root / "ImageSets" / "SegmentationContext" / "val.txt").write_text("2008_000002\n")
    return root


@pytest.mark.parametrize("above", [0, 1, 2])
def test_pascal_context_is_read_with_its_background(context, above):
    found = open_segmentation([context, *context.parents][above], "val")
    assert len(found.classes) == 60
    assert (found.classes[0], found.classes[1], found.classes[59]) == ("background", "aeroplane", "wood")
    assert found.background == 0
    assert found.mask(0).unique().tolist() == [0, 1, 59]
    assert "SegmentationClassContext" in found.masks[0]


def test_pascal_context_without_background_numbers_from_the_first_class(context):
    found = open_segmentation(context, "val", layout="pascal-context-59")
    assert (len(found.classes), found.classes[0], found.background) == (59, "aeroplane", None)
    assert found.mask(0).unique().tolist() == [0, 58, IGNORE]


def test_of_several_years_of_voc_2012_is_taken_unless_context_is_asked_for(voc, context):
    assert open_segmentation(voc.parent, "val").classes == VOC
    assert len(open_segmentation(voc.parent, "val", layout="pascal-context-60").classes) == 60


@pytest.fixture(params=["images/annotations", "images/stuffthingmaps", "./stuffthingmaps_trainval2017"])
def coco(tmp_path, request):
    images, masks = request.param.split("/")
    write(tmp_path / images / "val2017" / "000000000139.jpg", noise((12, 8)))
    # Person, stop sign behind the first gap, toothbrush, banner, wood, and no label.
    write(tmp_path / masks / "val2017" / "000000000139.png", index_mask((0, 12, 89, 91, 181, 255)))
    return tmp_path


def test_coco_stuff_has_no_gaps_between_its_classes(coco):
    found = open_segmentation(coco, "val")
    assert len(found.classes) == 171
    assert found.mask(0)[0, :6].tolist() == [0, 11, 79, 80, 170, IGNORE]
    named = [found.classes[number] for number in (0, 11, 79, 80, 170)]
    assert named == ["person", "stop sign", "toothbrush", "banner", "wood"]
    with pytest.raises(DataError, match=r"0 pairs .*found no images by .*train2017"):
        open_segmentation(coco, "train")


def test_an_index_that_coco_dropped_is_refused(coco):
    write(next(coco.rglob("*.png")), index_mask((0, 11)))
    with pytest.raises(DataError, match="indices 11"):
        open_segmentation(coco, "val").mask(0)


def test_coco_object_takes_stuff_for_background(coco):
    found = open_segmentation(coco, "val", layout="coco-object")
    assert (len(found.classes), found.background) == (81, 0)
    assert found.mask(0)[0, :6].tolist() == [1, 12, 80, 0, 0, 0]
    assert (found.classes[1], found.classes[80]) == ("person", "toothbrush")


def test_a_wrong_root_says_what_was_found_and_expected(tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(DataError, match=r"holiday.*JPEGImages"):
        open_segmentation(tmp_path, "val")
    with pytest.raises(DataError, match="no such folder"):
        open_segmentation(tmp_path / "nowhere", "val")


def test_a_missing_split_file_is_named(voc):
    (voc / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt"):
        open_segmentation(voc, "val")


def test_a_missing_mask_is_named(own_folder):
    (own_folder / "masks" / "val" / "a.png").unlink()
    with pytest.raises(DataError, match=r"masks/val/a\.png"):
        open_segmentation(own_folder, "val")


def test_the_folder_of_an_empty_split_is_named(own_folder):
    (own_folder / "images" / "val" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"0 pairs .*found no images by .*images/val;"):
        open_segmentation(own_folder, "val")


def test_a_layout_asked_for_that_is_not_there_is_an_error(voc):
    (voc / "classes.txt").write_text("road\ncar\n")
    (voc / "val.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"images, and there is no such folder"):
        open_segmentation(voc, "val", layout="folder")


def test_a_missing_class_list_is_named(own_folder):
    (own_folder / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt"):
        open_segmentation(own_folder, "val")


def test_a_palette_saved_in_colours_is_refused(tmp_path):
    write(tmp_path / "mask.png", Image.new("RGB", (4, 4), (128, 0, 0)))
    with pytest.raises(DataError, match=r"mask\.png is a picture of mode RGB"):
        read_index_mask(tmp_path / "mask.png")


def test_a_class_list_too_short_names_the_mask_and_its_index(own_folder):
    write(own_folder / "masks" / "val" / "a.png", index_mask((0, 1, 2)))
    with pytest.raises(DataError, match=r"a\.png has indices 2 that stand for none of the 2 classes"):
        open_segmentation(own_folder, "val").mask(0)


def test_a_mask_of_another_size_than_its_image_is_refused(own_folder):
    with pytest.raises(DataError, match=r"12x8 pixels, its image .* 24x16"):
        open_segmentation(own_folder, "val").mask(0, (16, 24))


def test_a_broken_mask_is_named(own_folder):
    (own_folder / "masks" / "val" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"a\.png"):
        open_segmentation(own_folder, "val").mask(0)


@given(seed=st.integers(0, 1000), rows=st.integers(1, 4), cols=st.integers(1, 4))
def test_shares_are_the_mean_of_one_hot_pixels(seed, rows, cols):
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 4, (rows * 6, cols * 5), generator=generator)
    classes[classes == 3] = IGNORE
    shares = class_shares(classes, (rows, cols), 3)
    for index in range(3):
        means = torch.nn.functional.avg_pool2d((classes == index).float()[None], (6, 5))[0]
        torch.testing.assert_close(shares[..., index], means)


@pytest.fixture
def ade(tmp_path):
    for folder, image in (("images", noise((12, 8))), ("annotations", index_mask((0, 1, 2)))):
        suffix = "jpg" if folder == "images" else "png"
        write(tmp_path / "ade" / folder / "validation" / f"ADE_1.{suffix}", image)
    names = "Idx\tName\n1\twall\n2\tsofa\n"
    (tmp_path / "ade" / "objectInfo150.txt").write_text(names)
    return tmp_path / "ade", "images/validation/ADE_1.jpg"


@pytest.fixture
def pixel_maps(tmp_path):
    write(tmp_path / "coco" / "images" / "val2017" / "1.jpg", noise((12, 8)))
    write(tmp_path / "coco" / "annotations" / "val2017" / "1.png", index_mask((0, 1)))
    return tmp_path / "coco", "images/val2017/1.jpg"


@pytest.fixture
def cityscapes(tmp_path):
    root = tmp_path / "city"
    write(root / "leftImg8bit" / "val" / "ulm" / "ulm_1_leftImg8bit.png", noise((12, 8)))
    write(root / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_labelIds.png", index_mask((7, 8)))
    return root, "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png"


@pytest.fixture
def camvid(tmp_path):
    for folder, image in (("images", noise((12, 8))), ("masks", index_mask((0, 10)))):
        write(tmp_path / "camvid" / folder / "val" / "0001TP_1.png", image)
    return tmp_path / "camvid", "masks/val/0001TP_1.png"


@pytest.mark.parametrize("layout", ["ade", "pixel_maps", "cityscapes", "camvid"])
def test_hidden_files_are_no_pictures_of_any_layout(layout, request):
    root, file = request.getfixturevalue(layout)
    before = open_segmentation(root, "val")
    leave_copies(root / file)
    assert open_segmentation(root, "val") == before
    assert len(before) == 1


@pytest.mark.parametrize("layout", ["ade", "pixel_maps"])
def test_linked_pictures_of_any_layout_are_read(layout, request, tmp_path):
    root, file = request.getfixturevalue(layout)
    folder = (root / file).parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert len(open_segmentation(root, "val")) == 1


def test_a_mask_of_more_pixels_than_pil_takes_is_one_clear_error(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "mask.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 // 2 - 1)  # PIL refuses from twice as many on
    with pytest.raises(DataError, match=r"cannot read mask .*mask\.png"):
        read_index_mask(tmp_path / "mask.png")


def test_a_segmentation_dataset_has_no_class_folders(own_folder):
    with pytest.raises(DataError, match="found images, masks"):
        open_labelled(own_folder)
    for split in ("train", "val"):  # the same the other way round
        for kind in ("images", "masks"):
            write(own_folder / split / kind / "a.png", noise())
    with pytest.raises(DataError, match="found images, masks"):
        open_split(own_folder, "val")
