"""Retrieval: whether a caption finds its picture, and a picture its captions, by a CLIP-type model as it is.

    pictures ──► pooled output ──┐
                                 ├─ cosine ──► rank of the right one ──► recall at 1, 5, 10, both ways
    captions ──► text tower ─────┘

Text to image: share of captions whose picture is among the k nearest. Image to text: share of pictures one of
whose captions is among the k nearest (Karpathy and Fei-Fei 2015, arXiv 1412.2306). Nothing is trained. Like
top-1 it reads the global output alone, which a retrofit must not change.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from phreg.backbones.text import AT_ONCE, text_encoder
from phreg.errors import PhregError
from phreg.evaluation.bootstrap import PerPicture, resample
from phreg.evaluation.datasets.captions import Captioned, open_captions
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.protocol import ProtocolSettings
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.progress import track

DATA = "images with captions: a folder with captions.csv, or captions.json as COCO or Karpathy have it"
RECALLS = (1, 5, 10)
TREE = """captions/
  0001.jpg …
  captions.csv   lines of image,caption: 0001.jpg,a dog on a beach
or captions.json, in the form of COCO or Karpathy's splits"""
METRICS = (
    *(
        MetricSpec(
            f"image_recall{k}",
            label=f"text to image R@{k}",
            about=f"share of captions whose picture is among the {k} nearest",
        )
        for k in RECALLS
    ),
    *(
        MetricSpec(
            f"text_recall{k}",
            label=f"image to text R@{k}",
            about=f"share of pictures with a caption among the {k} nearest",
        )
        for k in RECALLS
    ),
)

SCORES_AT_ONCE = 50_000_000
"""Cosines that are held at a time, at most: 0.2 GB."""


class Settings(ProtocolSettings):
    """Zero-shot retrieval between pictures and captions."""

    captions: str | None = None
    """File of captions, CSV or JSON; unset means captions.csv or captions.json in the folder."""
    split: str = "test"
    """Split of a list in Karpathy's form."""
    template: str = "{}"
    """Sentence around a caption, with {} for it; CLIP's paper has "a photo of {}"."""
    reading: FeatureConfig = FeatureConfig(fit="crop", readout="plain")
    """Canvas of the pictures, read plain, as global features mean something. SigLIP's own is fit=square."""


PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "clip-benchmark": {
        "template": "{}",
        "reading": {"fit": "crop"},
        "differs": (
            "pictures are cut to their middle square and then resampled, theirs the other way round",
            "a tie counts as a miss, theirs by chance",
        ),
    },
}
"""LAION's, with sources in `phreg/evaluation/README.md`."""


def is_stochastic(_data: str, _settings: Settings) -> bool:
    """Nothing is drawn."""
    return False


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:  # noqa: ARG001
    """Measures recall at 1, 5 and 10, both ways.

    Raises:
        DataError: The folder has no captions, or a picture is missing or cannot be read.
        PhregError: The model has no text tower, which is found out before anything is read; or the template
            has no place for a caption.
    """
    encode = text_encoder(reader.backbone)
    if "{}" not in settings.template:
        raise PhregError(
            f"template {settings.template!r} has no place for a caption; write {{}} where it goes"
        )
    found = open_captions(data, settings.captions, settings.split)
    sentences = [settings.template.replace("{}", caption) for caption in found.captions]
    parts = [sentences[first : first + AT_ONCE] for first in range(0, len(sentences), AT_ONCE)]
    texts = torch.cat([encode(part).cpu() for part in track("captions", parts)])
    pooled = [dense.pooled for dense in reader.stream(found.images, settings.reading, "pictures")]
    owners = torch.tensor(found.owners)
    of_captions, of_pictures = ranks(torch.stack(pooled), texts, owners)
    return _metrics(found, of_captions, of_pictures, owners)


def ranks(
    images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"], owners: Int64[Tensor, " texts"]
) -> tuple[Int64[Tensor, " texts"], Int64[Tensor, " images"]]:
    """Counts what is nearer than the right one, or as near.

    Args:
        images: Embeddings of pictures.
        texts: Embeddings of captions.
        owners: Number of the picture that each caption is of.

    Returns:
        For each caption, other pictures that are no farther away than its own; for each picture, captions of
        others that are no farther away than the nearest of its own.
    """
    images, texts = normalize(images, dim=1), normalize(texts, dim=1)
    of_texts, of_images = [], []
    for part in torch.arange(len(texts)).split(max(1, SCORES_AT_ONCE // len(images))):
        scores = texts[part] @ images.T
        own = scores.gather(1, owners[part, None])
        of_texts.append((scores >= own).sum(1) - 1)
    for part in torch.arange(len(images)).split(max(1, SCORES_AT_ONCE // len(texts))):
        scores = images[part] @ texts.T
        is_own = owners == part[:, None]
        nearest = scores.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
        of_images.append(((scores >= nearest) & ~is_own).sum(1))
    return torch.cat(of_texts), torch.cat(of_images)


def _metrics(found: Captioned, of_captions: Tensor, of_pictures: Tensor, owners: Tensor) -> Metrics:
    """Puts ranks into recalls; at more than there are to be found, every one would be."""
    pictures, captions = len(found.images), len(found.captions)
    each = torch.bincount(owners, minlength=pictures).double().numpy()[:, None]
    figures: dict[str, float] = {}
    shares: dict[str, PerPicture] = {}
    left_out: dict[str, str] = {}
    for k in RECALLS:
        if k < pictures:
            hit = (of_captions < k).double()
            figures[f"image_recall{k}"] = float(hit.mean())
            reached = torch.zeros(pictures, dtype=torch.double).index_add(0, owners, hit)
            shares[f"image_recall{k}"] = PerPicture(reached.numpy()[:, None], each)
        else:
            left_out[f"image_recall{k}"] = f"there are {pictures} pictures to find"
    for k in RECALLS:
        if k < captions:
            hit = (of_pictures < k).double()
            figures[f"text_recall{k}"] = float(hit.mean())
            shares[f"text_recall{k}"] = PerPicture.mean(hit.numpy())
        else:
            left_out[f"text_recall{k}"] = f"there are {captions} captions to find"
    notes: dict[str, Any] = {"pictures": pictures, "captions": captions}
    if left_out:
        notes["left_out"] = left_out
    over = {"images": pictures, "captions": captions}
    names = [found.images.name(number) for number in range(pictures)]
    guarded = [name for name in figures if name.endswith("recall1")]
    return Metrics(
        figures, notes=notes, guarded=guarded, counts=dict.fromkeys(figures, over), **resample(names, shares)
    )
