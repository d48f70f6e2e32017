import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from phreg.errors import DataError
from phreg.evaluation.datasets.boxed_images import Choice
from phreg.evaluation.datasets.boxes import COCO_LIST, open_boxed

SIZE = (40, 30)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def mask(*boxes, inside=255):
    pixels = np.zeros((SIZE[1], SIZE[0]), dtype=np.uint8)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = inside
    return Image.fromarray(pixels)


def thing(box, *, difficult=0, truncated=0, parts=""):
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return (
        f"<object><name>dog</name><truncated>{truncated}</truncated><difficult>{difficult}</difficult>"
        f"{parts}<bndbox>{sides}</bndbox></object>"
    )


@pytest.fixture
def voc(tmp_path):
    year = tmp_path / "VOCdevkit" / "VOC2007"
    head = thing((3, 3, 5, 5)).replace("object>", "part>")
    things = {
        "000005": thing((1, 1, 40, 30)) + thing((11, 2, 20, 9), parts=head),
        "000007": thing((5, 5, 9, 9), difficult=1) + thing(("6.5", 5, 9, 9), truncated=1),
    }
    for stem, inside in things.items():
        write(year / "JPEGImages" / f"{stem}.jpg", noise(SIZE))
        (year / "Annotations").mkdir(exist_ok=True)
        (year / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{inside}</annotation>")
    (year / "ImageSets" / "Main").mkdir(parents=True)
    (year / "ImageSets" / "Main" / "trainval.txt").write_text("000005\n000007\n")
    return year


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    names = {number: f"COCO_train2014_{number:012}.jpg" for number in (9, 25, 30)}
    for name in names.values():
        write(root / "train2014" / name, noise(SIZE))
    boxes = [
        (9, [1.4, 2.0, 10.2, 5.6], 0),
        (9, [0, 0, 40, 30], 1),
        (25, [0, 0, 5, 5], 1),
        (30, [2, 2, 3, 3], 0),
    ]
    content = {
        "images": [{"id": number, "file_name": name} for number, name in names.items()],
        "annotations": [{"image_id": number, "bbox": box, "iscrowd": crowd} for number, box, crowd in boxes],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2014.json").write_text(json.dumps(content))
    (root / COCO_LIST).write_text(f"train2014/{names[9]}\ntrain2014/{names[25]}\n")
    return root


@pytest.fixture
def masks(tmp_path):
    root = tmp_path / "salient"
    write(root / "images" / "0001.jpg", noise(SIZE))
    write(root / "masks" / "0001.png", mask((2, 3, 10, 8), (20, 15, 30, 25)))
    return root


def test_voc_counts_pixels_from_one_and_includes_the_last(voc):
    found = open_boxed(voc)
    assert found.boxes[0].tolist() == [[0, 0, 40, 30], [10, 1, 20, 9]]
    assert found.boxes[1].tolist() == [[4, 4, 9, 9], [5.5, 4, 9, 9]]
    found.check(0, (30, 40))


def test_a_picture_with_boxes_is_never_read_at_a_reduced_size(voc):
    images = open_boxed(voc).images
    with pytest.raises(DataError, match=r"40x30.* where a mask, depths or boxes go with them"):
        replace(images, max_megapixels=40 * 30 / 1e6 - 1e-6).read(0)


def test_hard_objects_of_voc_can_be_left_out_and_images_without_others_with_them(voc):
    found = open_boxed(voc, Choice(hard=False))
    assert (len(found), found.without) == (1, 1)


def test_voc_is_found_in_the_kit_above_unless_there_are_two_years(voc):
    assert len(open_boxed(voc.parent)) == len(open_boxed(voc.parent.parent)) == 2
    (voc.parent / "VOC2012" / "Annotations").mkdir(parents=True)
    with pytest.raises(DataError, match=r"VOC2007, .*VOC2012.*one year"):
        open_boxed(voc.parent)


@pytest.mark.parametrize("broken", ["<annotation>", "<annotation><object/></annotation>", None])
def test_a_broken_or_missing_annotation_is_named(voc, broken):
    path = voc / "Annotations" / "000007.xml"
    path.unlink() if broken is None else path.write_text(broken)
    with pytest.raises(DataError, match=r"000007\.xml"):
        open_boxed(voc)


def test_a_missing_list_or_image_of_voc_is_named(voc):
    (voc / "JPEGImages" / "000005.jpg").unlink()
    with pytest.raises(DataError, match=r"000005\.jpg"):
        open_boxed(voc)
    (voc / "ImageSets" / "Main" / "trainval.txt").unlink()
    with pytest.raises(DataError, match=r"trainval\.txt"):
        open_boxed(voc)


def test_coco_takes_the_images_of_its_list_and_no_crowds(coco):
    found = open_boxed(coco)
    assert found.images.name(0).endswith("train2014/COCO_train2014_000000000009.jpg")
    assert found.boxes[0].tolist() == [[1, 2, 12, 8]]  # 1.4 + 10.2 and 2 + 5.6, rounded
    assert (len(found), found.without) == (1, 1)


def test_another_list_of_coco_may_have_numbers(coco, tmp_path):
    (tmp_path / "mine.txt").write_text("30\n")
    assert open_boxed(coco, Choice(names=tmp_path / "mine.txt")).boxes[0].tolist() == [[2, 2, 5, 5]]


@pytest.mark.parametrize(
    ("listed", "named"), [(None, COCO_LIST), ("dog.jpg", "dog"), ("999", "1 of which are not in .*train2014")]
)
def test_what_is_wrong_with_cocos_list_is_said(coco, listed, named):
    path = coco / COCO_LIST
    path.unlink() if listed is None else path.write_text(listed)
    with pytest.raises(DataError, match=named):
        open_boxed(coco)


def test_broken_annotations_of_coco_are_named(coco):
    path = coco / "annotations" / "instances_train2014.json"
    for content in ('{"images": [{}]}', "{"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"instances_train2014\.json"):
            open_boxed(coco)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("boxes.json", '{"a.jpg": [[1, 2, 3, 4], [5, 6, 7, 8]], "b.jpg": []}'),
        ("boxes.csv", "file,left,top,right,bottom\na.jpg,1,2,3,4\na.jpg,5,6,7,8\n"),
    ],
)
def test_boxes_of_ones_own_are_read_from_json_or_csv(tmp_path, name, text):
    for image in ("a.jpg", "b.jpg"):
        write(tmp_path / image, noise(SIZE))
    (tmp_path / name).write_text(text)
    found = open_boxed(tmp_path)
    assert [boxes.tolist() for boxes in found.boxes] == [[[1, 2, 3, 4], [5, 6, 7, 8]]]
    assert found.without == (name == "boxes.json")


@pytest.mark.parametrize(
    ("text", "named"),
    [("a.jpg,1,2,3", "four numbers: a"), ("a.jpg,1,2,3,x", "boxes.csv"), ("c.jpg,1,2,3,4", "c.jpg")],
)
def test_broken_boxes_are_named(tmp_path, text, named):
    write(tmp_path / "a.jpg", noise(SIZE))
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(DataError, match=named):
        open_boxed(tmp_path)


@pytest.mark.parametrize("box", [[0, 0, 99, 5], [5, 5, 5, 9], [-3, 0, 4, 4]])
def test_boxes_outside_of_their_picture_are_refused(tmp_path, box):
    write(tmp_path / "a.jpg", noise(SIZE))
    (tmp_path / "boxes.json").write_text(json.dumps({"a.jpg": [box]}))
    with pytest.raises(DataError, match=r"boxes\.json on .*a\.jpg: boxes .* not all within 40x30"):
        open_boxed(tmp_path).check(0, (30, 40))


@pytest.mark.parametrize("inside", [1, 255])
def test_the_box_of_a_mask_is_around_all_of_it_or_around_each_part(masks, inside):
    write(masks / "masks" / "0001.png", mask((2, 3, 10, 8), (20, 15, 30, 25), inside=inside))
    assert open_boxed(masks).boxes[0].tolist() == [[2, 3, 30, 25]]
    parts = open_boxed(masks, Choice(components=True)).boxes[0]
    assert parts.tolist() == [[2, 3, 10, 8], [20, 15, 30, 25]]


def test_an_image_whose_mask_is_empty_is_left_out(masks):
    write(masks / "images" / "more" / "0002.jpg", noise(SIZE))
    write(masks / "masks" / "more" / "0002.png", mask())
    found = open_boxed(masks)
    assert (len(found), found.without) == (1, 1)
    (masks / "names.txt").write_text("more/0002.jpg\n")
    with pytest.raises(DataError, match="none of the 1 images"):
        open_boxed(masks, Choice(names=masks / "names.txt"))


@pytest.mark.parametrize("line", ["f0.5", "f0.5.jpg"])
def test_a_dot_in_a_name_is_no_suffix(masks, tmp_path, line):
    write(masks / "images" / "f0.5.jpg", noise(SIZE))
    write(masks / "masks" / "f0.5.png", mask((2, 3, 10, 8)))
    (tmp_path / "names.txt").write_text(line)
    assert open_boxed(masks, Choice(names=tmp_path / "names.txt")).images.name(0).endswith("f0.5.jpg")
    (masks / "images" / "boxes.csv").write_text("f0.5.jpg,1,2,3,4\n")
    found = open_boxed(masks / "images", Choice(names=tmp_path / "names.txt"))
    assert found.images.name(0).endswith("f0.5.jpg")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line", ["IMG 1", "IMG 1.jpg"])
def test_a_list_of_names_is_read_by_whole_lines(masks, tmp_path, line, encoding):
    for stem, box in (("IMG 1", (2, 3, 10, 8)), ("IMG", (0, 0, 5, 5))):
        write(masks / "images" / f"{stem}.jpg", noise(SIZE))
        write(masks / "masks" / f"{stem}.png", mask(box))
    (tmp_path / "names.txt").write_text(f"{line}\n", encoding=encoding)
    assert open_boxed(masks, Choice(names=tmp_path / "names.txt")).boxes[0].tolist() == [[2, 3, 10, 8]]
    boxes = "IMG 1.jpg,1,2,3,4\nIMG.jpg,5,6,7,8\n"
    (masks / "images" / "boxes.csv").write_text(boxes, encoding=encoding)
    found = open_boxed(masks / "images", Choice(names=tmp_path / "names.txt"))
    assert [boxes.tolist() for boxes in found.boxes] == [[[1, 2, 3, 4]]]


def test_no_other_picture_stands_in_for_one_that_is_missing(masks, tmp_path):
    (tmp_path / "names.txt").write_text("0001 b.jpg\n")
    with pytest.raises(DataError, match=r"1 of which are not in .*: 0001 b\.jpg"):
        open_boxed(masks, Choice(names=tmp_path / "names.txt"))


def test_names_of_voc_may_have_spaces_and_its_lists_columns(voc):
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (voc / folder / f"000005.{suffix}").rename(voc / folder / f"IMG 1.{suffix}")
    (voc / "ImageSets" / "Main" / "trainval.txt").write_text("IMG 1\n000007 -1\n")
    found = open_boxed(voc)
    assert [Path(path).stem for path in found.images.paths] == ["IMG 1", "000007"]


def test_coco_images_are_listed_by_the_names_that_its_annotations_give_them(coco):
    path = coco / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    content["images"][2]["file_name"] = "IMG 9.jpg"  # of id 30, and not 9
    path.write_text(json.dumps(content))
    (coco / "train2014" / "COCO_train2014_000000000030.jpg").rename(coco / "IMG 9.jpg")
    (coco / COCO_LIST).write_text("IMG 9.jpg\n")
    assert open_boxed(coco).boxes[0].tolist() == [[2, 2, 5, 5]]


def test_a_dot_in_a_name_of_voc_is_no_suffix(voc):
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (voc / folder / f"000005.{suffix}").rename(voc / folder / f"a.5.{suffix}")
    (voc / "ImageSets" / "Main" / "trainval.txt").write_text("a.5\n")
    assert open_boxed(voc).images.name(0).endswith("a.5.jpg")


def test_a_picture_is_turned_by_exif_only_where_its_mask_is(masks):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(SIZE).save(masks / "images" / "0001.jpg", exif=exif)
    found = open_boxed(masks)
    assert found.images.read(0).size == SIZE
    found.check(0, SIZE[::-1])
    exif[0x0112] = 3
    noise(SIZE).save(masks / "images" / "0001.jpg", exif=exif)
    with pytest.raises(DataError, match=r"EXIF says .*0001\.jpg"):
        open_boxed(masks)


def test_a_jpeg_will_do_for_a_mask_of_one_object(masks):
    (masks / "masks" / "0001.png").unlink()
    write(masks / "masks" / "0001.jpg", mask((8, 8, 24, 24)))
    # Within the blocks of 8 pixels that JPEG codes on their own.
    assert open_boxed(masks).boxes[0].tolist() == [[8, 8, 24, 24]]


def test_masks_of_classes_are_refused(masks):
    write(masks / "masks" / "0001.png", mask((2, 3, 10, 8), inside=11))
    with pytest.raises(DataError, match=r"0001\.png has values up to 11"):
        open_boxed(masks)


def test_a_mask_of_another_size_is_refused(masks):
    with pytest.raises(DataError, match=r"0001\.png on .*: made for 40x30 pixels, the picture has 60x30"):
        open_boxed(masks).check(0, (30, 60))


def test_an_image_without_a_mask_is_named(masks):
    write(masks / "images" / "0003.jpg", noise(SIZE))
    with pytest.raises(DataError, match=r"images/0003\.jpg"):
        open_boxed(masks)


def test_a_wrong_root_or_layout_says_what_was_found_and_expected(tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(DataError, match=r"holiday.*voc: Annotations"):
        open_boxed(tmp_path)
    with pytest.raises(DataError, match="known are auto, voc"):
        open_boxed(tmp_path, layout="lvis")
    with pytest.raises(DataError, match="no such folder"):
        open_boxed(tmp_path / "nowhere")


def sideways(path, orientation, size):
    """Writes a picture that EXIF says is to be turned; `size` is width and height as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(size).save(path, exif=exif)


def tell_size(kind, root, size):
    """Writes the width and height that the annotations of the first picture were made for."""
    if kind == "voc":
        path = root / "Annotations" / "000005.xml"
        sides = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
        path.write_text(path.read_text().replace("<annotation>", f"<annotation>{sides}"))
    elif size is not None:
        path = root / "annotations" / "instances_train2014.json"
        content = json.loads(path.read_text())
        content["images"][0] |= {"width": size[0], "height": size[1]}
        path.write_text(json.dumps(content))


@pytest.fixture(params=["voc", "coco"])
def annotated(request):
    """A dataset of pictures of `SIZE`, the first of which has a box, and where that picture is."""
    root = request.getfixturevalue(request.param)
    image = {"voc": "JPEGImages/000005.jpg", "coco": "train2014/COCO_train2014_000000000009.jpg"}
    return request.param, root, root / image[request.param]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("lies", ["as stored", "turned"])
def test_a_picture_is_turned_by_exif_only_where_its_boxes_are(annotated, orientation, lies):
    kind, root, image = annotated
    tell_size(kind, root, SIZE)
    sideways(image, orientation, SIZE if lies == "as stored" else SIZE[::-1])
    found = open_boxed(root)
    assert found.images.read(0).size == SIZE
    found.check(0, SIZE[::-1])


@pytest.mark.parametrize(
    ("orientation", "stored", "told"),
    [
        (6, (30, 30), (30, 30)),  # square
        (3, SIZE, SIZE),  # upside down, which no size tells
        (2, SIZE, SIZE),  # mirrored
        (6, SIZE, (80, 60)),  # made for a picture of another size
        (6, SIZE, None),
        (6, SIZE, (0, 0)),
    ],
)
def test_a_picture_of_which_its_boxes_do_not_tell_how_it_lies_is_refused(
    annotated, orientation, stored, told
):
    kind, root, image = annotated
    tell_size(kind, root, told)
    sideways(image, orientation, stored)
    with pytest.raises(DataError, match=rf"EXIF says of 1 of \d images .*{image.name}.*without an EXIF"):
        open_boxed(root)


def test_a_list_of_boxes_says_no_size_so_that_a_picture_turned_by_exif_is_refused(tmp_path):
    sideways(tmp_path / "a.jpg", 6, SIZE)
    (tmp_path / "boxes.json").write_text('{"a.jpg": [[1, 2, 3, 4]]}')
    with pytest.raises(DataError, match=r"EXIF says of 1 of 1 images .*a\.jpg"):
        open_boxed(tmp_path)


def test_boxes_made_for_another_size_than_the_picture_has_are_refused(annotated):
    kind, root, _ = annotated
    tell_size(kind, root, (80, 60))
    with pytest.raises(DataError, match=r"made for 80x60 pixels, the picture has 40x30"):
        open_boxed(root).check(0, SIZE[::-1])


def test_a_picture_that_is_left_out_may_lie_as_it_likes(coco):
    sideways(coco / "train2014" / "COCO_train2014_000000000025.jpg", 6, SIZE)
    assert len(open_boxed(coco)) == 1
