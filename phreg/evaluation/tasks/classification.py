"""Classification from global features: neighbours, a linear probe, the model's own classifier, class names.

This is the regression gate: a retrofit that repairs patches must not cost what CLS and pooled output know.

    training images ──► CLS, pooled, patch mean ──┬─ k nearest neighbours, by cosine ─┐
                                                  └─ logistic regression ─────────────┼─► top-1, top-5
    test images ─────► CLS, pooled, patch mean, logits of the model's own head ───────┤
    class names ─────► text embeddings of a CLIP-type model, compared with pooled ────┘

k-NN is that of Wu et al. 2018 (arXiv 1805.01978), as DINO and DINOv2 evaluate it: votes weighted by
exp(cosine / temperature). The probe is multinomial logistic regression with an L2 penalty, on standardised
features, solved by L-BFGS to convergence; there is no schedule to tune.

The data is divided into `train` and `val`, or else by the seed, class by class. The model's own head needs no
training images: its classes are numbered as the labels are, e.g. 0 to 999 for ImageNet. Nor does zero-shot
classification, which takes the class whose name, in 80 prompts, is nearest (Radford et al. 2021, arXiv
2103.00020).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Annotated, Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from phreg.analysis.linear import fit_softmax
from phreg.backbones.text import imagenet_names, text_encoder
from phreg.data.sources import Subset
from phreg.errors import DataError, PhregError
from phreg.evaluation.bootstrap import PerPicture, resample
from phreg.evaluation.datasets.labelled import Labelled, open_labelled, open_split
from phreg.evaluation.datasets.vocabulary import Vocabulary, embed_vocabulary, find_vocabulary
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.metrics.scores import is_in_top_k, top_k
from phreg.evaluation.protocol import ProtocolSettings
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.seeding import keyed_generator

Feature = Literal["cls", "pooled", "patch-mean"]
UNTRAINED = frozenset({"head", "zero-shot"})
"""Methods that need no training images."""


def _name(*parts: str) -> str:
    """Names a classifier or its figure: `knn_patch_mean_top1`."""
    return "_".join(parts).replace("-", "_")


def _several(value: Any) -> Any:
    """Takes `10,20` for two numbers."""
    return value.split(",") if isinstance(value, str) and "," in value else value


DATA = "images with a class each: class folders, a file of labels, or a Hugging Face dataset"
TREE = """dataset/
  train/cat/0001.jpg …  a folder a class, to train on
  val/cat/0002.jpg …    the same classes, to test on
Without train/ and val/ a share of each class is kept to test on. Or:
dataset/
  0001.jpg …
  labels.csv            lines of file,class; or labels.json
Or the id of a Hugging Face dataset."""


def _about(figure: str, by: str) -> str:
    among = "is the first named" if figure == "top1" else "is among the first five named"
    return f"share of images whose class {among}, by {by}"


METRICS = tuple(
    MetricSpec(
        _name(*classifier, figure), about=_about(figure, " on ".join(classifier) or "the first method")
    )
    for classifier in ((), *product(("knn", "linear"), get_args(Feature)), ("head",), ("zero-shot",))
    for figure in ("top1", "top5")
)
"""Of the first classifier without its name, then of each."""


class Settings(ProtocolSettings):
    """Classification from frozen global features."""

    methods: tuple[Literal["knn", "linear", "head", "zero-shot"], ...] = ("knn", "linear")
    """What classifies: knn (neighbours), linear (a probe), head (the model's own) or zero-shot (class names,
    with CLIP and SigLIP). The first is the headline."""
    features: tuple[Feature, ...] = ("pooled",)
    """What neighbours and probe are given. The first is the headline."""
    labels: str | None = None
    """File of labels for a flat folder: CSV lines of file,class, or JSON; unset means labels.csv in it."""
    words: str | None = None
    """What classes are called, for zero-shot: imagenet (open_clip's names, classes numbered 0 to 999), a list
    of phreg's, or a TOML file of class = ["word", "synonym"]; unset means as in the data."""
    template: str | None = None
    """Sentence around a class's name, with {} for it; unset means open_clip's 80 for ImageNet."""
    reading: FeatureConfig = FeatureConfig(fit="crop", readout="plain")
    """Canvas of the images; read plain, as global features mean something."""
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each class that is tested on, where the data has no splits."""
    neighbours: Annotated[PositiveInt | tuple[PositiveInt, ...], BeforeValidator(_several)] = 20
    """Neighbours that vote, at most as many as there are training images. Of several numbers the first is
    that of the figures, and the details have top-1 with each."""
    temperature: PositiveFloat = 0.07
    """Temperature of votes."""
    penalty: NonNegativeFloat = 1e-3
    """L2 penalty of the probe, times half the squared weights, beside the mean cross-entropy."""


PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "dinov2": {
        "methods": ("knn",),
        "features": ("pooled",),
        "reading": {"size": 224, "resize": 256, "fit": "crop"},
        "neighbours": (20, 10, 100, 200),
        "temperature": 0.07,
    },
}
"""DINOv2's k-NN, with sources in `phreg/evaluation/README.md`; of its four numbers of neighbours, 20 comes
first, which it says to be best mostly."""

Globals = dict[Feature, Float[Tensor, "_ _"]]
"""Global features of a set of images (images, dim), on the CPU."""

Scores = tuple[str, Tensor]
"""What something says of the test images, (images, classes), and its name."""


def is_stochastic(data: str, settings: Settings) -> bool:
    """What is held back for testing is, where something learns and the data has no splits."""
    learns = not set(settings.methods) <= UNTRAINED
    return learns and open_split(data, "val", labels=settings.labels) is None


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Measures the accuracy of each method on each feature.

    Raises:
        DataError: Images or labels cannot be read, there are no two classes, or one has no training image.
        PhregError: The model has no classifier, and one was asked for.
    """
    train, test = (
        (None, _tested(data, settings))
        if set(settings.methods) <= UNTRAINED
        else _divide(data, settings, seed)
    )
    seen = _read(reader, test, settings, "test images")
    found: dict[str, Iterable[Scores]] = {
        "head": _head_scores(reader, test, settings),
        "zero-shot": _word_scores(reader, test, seen, settings),
    }
    learned: Globals = {}
    if train is not None:
        learned = _read(reader, train, settings, "training images")
        found |= {name: _learned_scores(name, train, learned, test, seen, settings) for name in SCORES}
    figures: dict[str, float] = {}
    shares: dict[str, PerPicture] = {}
    detail: dict[str, dict[str, float]] = {}
    for method in settings.methods:
        for name, scores in found[method]:
            _add(figures, shares, name, scores, test.labels)
            if method != "head" and not detail:
                detail["top1"] = _per_class(scores, test)
    if train is not None and "knn" in settings.methods:
        detail |= _by_neighbours(train, learned, test, seen, settings)
    counts = {"train": len(train.labels) if train else 0, "test": len(test.labels)}
    guarded = tuple(name for name in figures if name.endswith("top1"))
    over = {"images": len(test.labels), "classes": len(test.labels.unique())}
    notes = {"images": counts, "classes": len(test.classes)}
    pictures = [test.images.name(number) for number in range(len(test.labels))]
    return Metrics(
        figures, detail, notes, guarded, dict.fromkeys(figures, over), **resample(pictures, shares)
    )


def knn_scores(
    bank: Float[Tensor, "images dim"],
    labels: Int64[Tensor, " images"],
    queries: Float[Tensor, "queries dim"],
    num_classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> Float[Tensor, "queries {num_classes}"]:
    """Lets the nearest images of a bank vote for their classes, weighted by exp(cosine / temperature)."""
    bank = normalize(bank, dim=1)
    scores = []
    for part in normalize(queries, dim=1).split(1024):  # a bank may hold a million images
        cosines, nearest = (part @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        votes = one_hot(labels[nearest], num_classes).float()
        scores.append(((cosines / temperature).exp().unsqueeze(-1) * votes).sum(1))
    return torch.cat(scores)


def zero_shot_scores(
    reader: FeatureReader, pooled: Float[Tensor, "images dim"], classes: tuple[str, ...], settings: Settings
) -> Float[Tensor, "images _"]:
    """Computes the cosine of images and class names, each name's synonyms averaged.

    Raises:
        DataError: A class has no name but a number.
        PhregError: The model has no text tower.
    """
    queries = embed_vocabulary(
        _vocabulary(classes, settings.words), text_encoder(reader.backbone), settings.template, "mean"
    )
    return normalize(pooled, dim=1) @ queries.embeddings.cpu().T


def _vocabulary(classes: tuple[str, ...], words: str | None) -> Vocabulary:
    """Finds what classes are called; ImageNet's all count, whether or not there are images of each."""
    if words != "imagenet":
        if words is None and all(re.fullmatch(r"\d+|n\d{8}", label) for label in classes):
            raise DataError(
                f"zero-shot asked for of {len(classes)} classes without names, such as {classes[0]}; set "
                "words=imagenet where they are ImageNet's, numbered 0 to 999, or give a TOML file of names"
            )
        return find_vocabulary(classes, words)
    names = imagenet_names()
    numbers = all(label.isdigit() and int(label) < len(names) for label in classes)
    # All of ImageNet's folders, which are numbered in the order of their WordNet ids, as its classes are.
    folders = len(classes) == len(names) and all(re.fullmatch(r"n\d{8}", label) for label in classes)
    if not (numbers or folders):
        raise DataError(
            f"words=imagenet asked for {len(classes)} classes such as {classes[0]}, expected numbers 0 to "
            f"{len(names) - 1}, or ImageNet's {len(names)} folders; number the classes in labels.csv"
        )
    return Vocabulary("imagenet", tuple((name,) for name in names))


def _knn(bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, settings: Settings) -> Tensor:
    number = settings.neighbours[0] if isinstance(settings.neighbours, tuple) else settings.neighbours
    return knn_scores(bank, labels, queries, num_classes, number, settings.temperature)


def _linear(bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, settings: Settings) -> Tensor:
    return fit_softmax(bank, labels, num_classes, settings.penalty, max_steps=500)(queries)


SCORES: dict[str, Callable[[Tensor, Tensor, Tensor, int, Settings], Tensor]] = {
    "knn": _knn,
    "linear": _linear,
}
"""Scores of test images (images, classes), by method."""


def _head_scores(reader: FeatureReader, test: Labelled, settings: Settings) -> list[Scores]:
    """What the model's own classifier says, read before anything is learned; nothing where not asked for."""
    if "head" not in settings.methods:
        return []
    logits = reader.logits(test.images, settings.reading, "test images")
    if int(test.labels.max()) >= logits.shape[1]:
        raise PhregError(
            f"head asked of {reader.backbone.describe()}, whose classifier has {logits.shape[1]} classes, on "
            f"labels up to {int(test.labels.max())}; number the labels as the classifier does, in labels.csv"
        )
    return [("head", logits)]


def _word_scores(
    reader: FeatureReader, test: Labelled, seen: Globals, settings: Settings
) -> Iterator[Scores]:
    yield _name("zero-shot"), zero_shot_scores(reader, seen["pooled"], test.classes, settings)


def _learned_scores(
    method: str, train: Labelled, learned: Globals, test: Labelled, seen: Globals, settings: Settings
) -> Iterator[Scores]:
    """Learns from each feature in turn."""
    for feature in settings.features:
        scores = SCORES[method](learned[feature], train.labels, seen[feature], len(test.classes), settings)
        yield _name(method, feature), scores


def _by_neighbours(
    train: Labelled, learned: Globals, test: Labelled, seen: Globals, settings: Settings
) -> dict[str, dict[str, float]]:
    """Measures top-1 of each feature with each number of neighbours, where several are asked for."""
    if isinstance(settings.neighbours, int):
        return {}
    found: dict[str, dict[str, float]] = {}
    for feature in settings.features:
        parts = found[_name("knn", feature, "top1")] = {}
        for number in settings.neighbours:
            alone = settings.model_copy(update={"neighbours": number})
            scores = _knn(learned[feature], train.labels, seen[feature], len(test.classes), alone)
            parts[f"{number} neighbours"] = top_k(scores, test.labels, 1)
    return found


def _tested(data: str, settings: Settings) -> Labelled:
    """Test images where nothing is learned: the validation split, or all there are."""
    found = open_split(data, "val", labels=settings.labels) or open_labelled(data, labels=settings.labels)
    if "zero-shot" in settings.methods and settings.words != "imagenet":
        _check_classes(len(found.classes), data)
    return found


def _check_classes(count: int, data: str) -> None:
    """Refuses one class alone, of which whatever is said is right."""
    if count < 2:
        raise DataError(
            f"classification asked for of {data}, found {count} class, and nothing to tell it from; add "
            "images of another class"
        )


def _divide(data: str, settings: Settings, seed: int) -> tuple[Labelled, Labelled]:
    """Training and test images: the data's own splits, or a share of each class drawn by the seed."""
    train = open_split(data, "train", labels=settings.labels)
    test = open_split(data, "val", labels=settings.labels)
    if train is not None and test is not None:
        if train.classes != test.classes:
            raise DataError(
                f"{data} has {len(train.classes)} classes to train on and {len(test.classes)} to test on, "
                "which are not the same; give both the same class folders"
            )
        _check_classes(len(train.labels.unique()), data)
        return train, test
    whole = open_labelled(data, labels=settings.labels)
    _check_classes(len(whole.labels.unique()), data)
    held: list[int] = []
    for label in whole.labels.unique().tolist():
        members = (whole.labels == label).nonzero().flatten()
        if len(members) < 2:
            raise DataError(
                f"class {whole.classes[label]!r} of {data} has 1 image, and neighbours and probe need one to "
                "learn from and one to test on; add images, or use methods=head"
            )
        count = min(len(members) - 1, max(1, round(settings.val_share * len(members))))
        order = torch.randperm(len(members), generator=keyed_generator("split", seed, label))
        held += members[order[:count]].tolist()
    train = sorted(set(range(len(whole.labels))) - set(held))
    parts = [
        Labelled(Subset(whole.images, part), whole.labels[part], whole.classes)
        for part in (train, sorted(held))
    ]
    return parts[0], parts[1]


def _read(reader: FeatureReader, images: Labelled, settings: Settings, what: str) -> Globals:
    rows: dict[Feature, list[Tensor]] = {"cls": [], "pooled": [], "patch-mean": []}
    for dense in reader.stream(images.images, settings.reading, what):
        rows["cls"].append(dense.cls)
        rows["pooled"].append(dense.pooled)
        rows["patch-mean"].append(dense.grid.mean((0, 1)))
    return {name: torch.stack(found) for name, found in rows.items()}


def _add(
    figures: dict[str, float], shares: dict[str, PerPicture], name: str, scores: Tensor, labels: Tensor
) -> None:
    """Adds top-1 and top-5, and what each image adds to them; the first method's are also the headline."""
    prefixes = [f"{name}_"] if figures else ["", f"{name}_"]
    for prefix, k in product(prefixes, (1, 5)):
        figures[f"{prefix}top{k}"] = top_k(scores, labels, k)
        shares[f"{prefix}top{k}"] = PerPicture.mean(is_in_top_k(scores, labels, k).numpy())


def _per_class(scores: Tensor, test: Labelled) -> dict[str, float]:
    right = (scores.argmax(1) == test.labels).double()
    return {name: float(right[test.labels == number].mean()) for number, name in enumerate(test.classes)}
