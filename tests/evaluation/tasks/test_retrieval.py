"""Retrieval: the whole against a loop with the model's own functions, and what is refused."""

import json

import families_open_clip
import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from torch.nn.functional import normalize

from phreg.backbones.resolve import adapt
from phreg.errors import DataError, PhregError
from phreg.evaluation.datasets.captions import open_captions
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.tasks import retrieval
from phreg.evaluation.tasks.retrieval import Settings, ranks, run

CAPTIONS = {f"{number}.png": [f"picture {number}", f"a view of {number} things"] for number in range(12)}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    text = families_open_clip.TEXT | {"vocab_size": 49408, "context_length": 16}
    return families_open_clip.shaken(CLIP(embed_dim=16, vision_cfg=families_open_clip.VISION, text_cfg=text))


@pytest.fixture
def reader(clip, tmp_path):
    return FeatureReader(adapt(clip), "clip", FeatureCache(tmp_path / "cache"), batch_size=5)


@pytest.fixture
def album(tmp_path):
    """Twelve pictures with two captions each, of the model's own size."""
    generator = np.random.default_rng(0)
    root = tmp_path / "album"
    root.mkdir()
    for name in CAPTIONS:
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32)).save(root / name)
    lines = [f'{name},"{text}, seen"' for name, texts in CAPTIONS.items() for text in texts]
    (root / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    return root


@torch.no_grad()
def test_the_task_equals_a_loop_over_captions_and_pictures(reader, clip, album, whole_sample):
    found = run(reader, str(album), Settings(template="see {}"), seed=0)

    inputs = [np.array(Image.open(album / name)) / np.float32(255) for name in CAPTIONS]
    pixels = (np.stack(inputs) - open_clip.OPENAI_DATASET_MEAN) / open_clip.OPENAI_DATASET_STD
    images = normalize(clip.encode_image(torch.tensor(pixels).float().permute(0, 3, 1, 2)), dim=1).numpy()
    sentences = [f"see {text}, seen" for texts in CAPTIONS.values() for text in texts]
    texts = normalize(clip.encode_text(open_clip.tokenize(sentences, context_length=16)), dim=1).numpy()
    for k in (1, 5, 10):
        by_text = [number // 2 in np.argsort(-images @ text)[:k] for number, text in enumerate(texts)]
        by_image = [
            bool({2 * number, 2 * number + 1} & set(np.argsort(-texts @ image)[:k]))
            for number, image in enumerate(images)
        ]
        assert found.figures[f"image_recall{k}"] == pytest.approx(np.mean(by_text))
        assert found.figures[f"text_recall{k}"] == pytest.approx(np.mean(by_image))
    assert 0 < found.figures["image_recall10"] < 1, "something is found, and something is not"
    assert next(iter(found.figures)) == "image_recall1"
    assert found.guarded == ["image_recall1", "text_recall1"]
    assert found.counts["text_recall5"] == {"images": 12, "captions": 24}
    whole_sample(found, *found.figures)


def test_ranks_count_what_is_nearer_or_as_near():
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8], [0.0, 0.7, 0.7], [0.0, 0.1, 0.9]])
    owners = torch.tensor([0, 1, 1, 2])
    of_texts, of_images = ranks(images, texts, owners)
    assert of_texts.tolist() == [0, 1, 1, 0], "the third is as near to another picture, which is a miss"
    assert of_images.tolist() == [0, 0, 0]
    # Turned over, pictures 0 and 2 are at right angles to their own captions, and nothing is farther away.
    assert ranks(images, texts.flip(1), owners)[1].tolist() == [3, 0, 3]


def test_ranks_are_the_same_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(7, 4, generator=generator), torch.randn(15, 4, generator=generator)
    owners = torch.randint(7, (15,), generator=generator)
    owners[:7] = torch.arange(7)
    whole = ranks(images, texts, owners)
    monkeypatch.setattr(retrieval, "SCORES_AT_ONCE", 20)
    for found, expected in zip(ranks(images, texts, owners), whole, strict=True):
        assert torch.equal(found, expected)


def test_recall_of_as_many_as_there_are_is_left_out_with_the_reason(reader, album):
    lines = [f"{name},{texts[0]}" for name, texts in CAPTIONS.items()]
    (album / "captions.csv").write_text("\n".join(lines[:5]))
    found = run(reader, str(album), Settings(), seed=0)
    assert list(found.figures) == ["image_recall1", "text_recall1"]
    assert found.notes["left_out"]["image_recall5"] == "there are 5 pictures to find"


def test_a_model_without_a_text_tower_is_refused_before_anything_is_read(tiny, tmp_path):
    bare = FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"))
    with pytest.raises(PhregError, match="which has no text tower; give a whole image-text model"):
        run(bare, str(tmp_path / "nowhere"), Settings(), seed=0)


def test_a_template_without_a_place_for_the_caption_is_refused(reader, album):
    with pytest.raises(PhregError, match="has no place for a caption"):
        run(reader, str(album), Settings(template="a photo"), seed=0)


def coco(root):
    images = [{"id": 7 + number, "file_name": name} for number, name in enumerate(CAPTIONS)]
    texts = [
        {"image_id": 7 + number, "caption": text}
        for number, of in enumerate(CAPTIONS.values())
        for text in of
    ]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": texts}))


def karpathy(root):
    images = [
        {"filepath": ".", "filename": name, "split": "test", "sentences": [{"raw": text} for text in texts]}
        for name, texts in CAPTIONS.items()
    ]
    others = [{"filename": "absent.png", "split": "train", "sentences": [{"raw": "no picture"}]}]
    (root / "captions.json").write_text(json.dumps({"images": images + others}))


@pytest.mark.parametrize("write", [coco, karpathy])
def test_captions_of_coco_and_of_karpathys_splits_are_read(album, write):
    (album / "captions.csv").unlink()
    (album / "images").mkdir()
    for name in CAPTIONS:
        (album / name).rename(album / "images" / name)
    write(album)
    found = open_captions(album)
    assert found.captions == tuple(text for texts in CAPTIONS.values() for text in texts)
    assert found.owners == tuple(number // 2 for number in range(24))
    assert [path.rsplit("/", 1)[1] for path in found.images.paths] == list(CAPTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.png,one\nnowhere.png,two", r"lists 2 pictures, 1 of which are neither in .*: nowhere.png"),
        ("0.png,one", "captions of 1 pictures, and blank ones of 0"),
        ("0.png,one\n1.png, ", r"blank ones of 1: 1.png"),
        ("0.png\n1.png,two", r"cannot read captions from .* \(IndexError"),
    ],
)
def test_a_file_of_captions_that_lacks_something_is_refused_by_name(album, text, message):
    (album / "captions.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_captions(album)


def test_a_folder_without_captions_is_refused_with_what_is_expected(album):
    (album / "captions.csv").unlink()
    with pytest.raises(DataError, match=r"found none of captions.csv, captions.json; write lines of image,"):
        open_captions(album)
    (album / "captions.json").write_text('{"images": [1]}')
    with pytest.raises(DataError, match="cannot read captions"):
        open_captions(album)
