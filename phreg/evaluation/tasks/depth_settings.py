"""Settings of linear depth, its published protocols, and the schedules that they ask for."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from phreg.config import Fraction
from phreg.evaluation.datasets.augmentation import CropConfig
from phreg.evaluation.feature_config import FeatureConfig
from phreg.evaluation.protocol import ProtocolSettings
from phreg.evaluation.tasks.schedules import decay, dinov3_beta, dinov3_rate, one_cycle_beta, warm_up


class Settings(ProtocolSettings):
    """A linear head of depth bins on frozen tokens."""

    layout: str = "auto"
    """Layout of the dataset: nyu-mat, nyu-folders or folder (images/ and depths/, each with train/ and val/);
    auto tells it by what lies in the folder."""
    unit: PositiveFloat | None = None
    """Metres a step of all depth maps; unset means 0.001 for grey PNG of 16 bits, 1 for .npy of floats; of
    other files it must be set."""
    min_depth: PositiveFloat = 1e-3
    """Nearest depth in metres; nearer pixels do not count."""
    max_depth: PositiveFloat = 10.0
    """Farthest depth in metres; farther pixels do not count."""
    bins: Annotated[int, Field(ge=2)] = 256
    """Depths the head scores, evenly spaced."""
    reading: FeatureConfig = FeatureConfig(size=448)
    """Canvas of the pictures when testing, and when training without crops."""
    flip: bool = True
    """Test the mirror image too, and take the mean."""
    augment: bool = False
    """Train on random crops, read anew each step, rather than on features read once."""
    crop: CropConfig = CropConfig(size=416, scale=(1.0, 1.0), max_class_share=1.0)
    """Those crops."""
    steps: PositiveInt = 1000
    """Training steps."""
    train_batch_size: PositiveInt = 8
    """Pictures per training step."""
    lr: PositiveFloat = 5e-3
    """Highest learning rate of AdamW."""
    weight_decay: NonNegativeFloat = 1e-2
    """Weight decay of AdamW."""
    warmup: NonNegativeInt = 100
    """Steps of linear warm-up, ahead of a cosine decay to 0."""
    warmup_start: Fraction | None = None
    """Share of the learning rate that the warm-up starts from; unset means one step's share, or with
    schedule=dinov3 that of its own."""
    schedule: Literal["cosine", "dinov3"] = "cosine"
    """Decay of the learning rate: cosine is mmcv's, dinov3 DINOv3's one-cycle cosine."""
    final_share: Fraction = 0.0
    """Share of the learning rate that schedule=dinov3 ends near, the inverse of its final_div_factor."""
    momentum: tuple[Fraction, Fraction] | None = None
    """Least and largest first beta of AdamW, moved as the one-cycle schedule moves it; unset keeps 0.9."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Second beta of AdamW."""
    class_token: bool = True
    """Put the CLS beside each patch."""
    batch_norm: bool = False
    """Normalise features by the statistics of batches, ahead of the linear map."""
    finer: PositiveInt = 4
    """Scores are resampled so many times finer than patches, before they become depths."""
    log_offset: NonNegativeFloat = 0.0
    """Metres added to depths before the losses take their logarithm."""
    keep_best: PositiveInt | None = None
    """Test after every so many steps, and keep the head of the least abs_rel; unset keeps the last."""
    scale_only: NonNegativeInt = 100
    """First steps, in which the loss sees the mean error of log depths alone."""
    gradient_weight: NonNegativeFloat = 0.5
    """Weight of the gradient loss."""
    clip: PositiveFloat = 35.0
    """Largest norm of the gradient."""

    @model_validator(mode="after")
    def _range(self) -> "Settings":
        if self.min_depth >= self.max_depth:
            raise ValueError(
                f"min_depth should be less than max_depth, found {self.min_depth:g} and {self.max_depth:g}"
            )
        return self


_NYU = {
    "reading": {"size": None, "fit": "centred"},
    "augment": True,
    "crop": {
        "size": (416, 544),
        "scale": (426 / 416, 426 / 416),
        "rotation": 2.5,
        "colour": 0.0,
        "gamma": (0.9, 1.1),
        "brightness": (0.75, 1.25),
        "tint": (0.9, 1.1),
        "outside": "black",
    },
    "train_batch_size": 16,
    "warmup": 12_800,
    "momentum": (0.85, 0.95),
    "log_offset": 0.001,
    "differs": ("training crops lie within the 426x560 pixels that count, theirs within 427x565",),
}
"""What all published settings for NYUv2 have in common."""

_DVT = _NYU | {"steps": 38_400, "warmup_start": 0.001, "gradient_weight": 0.0, "keep_best": 800}
"""Its gradient loss compares pictures of a batch instead of pixels, and is 0 with two pictures a device."""

PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "dinov3": _NYU
    | {
        "steps": 38_400,
        "lr": 3e-4,
        "weight_decay": 1e-4,
        "beta2": 0.99,
        "schedule": "dinov3",
        "final_share": 0.001,
        "class_token": False,
        "batch_norm": True,
        "finer": 1,
        "gradient_weight": 0.0,
    },
    "dvt": _DVT,
    "ph-reg": _DVT | {"steps": 30_000, "keep_best": 500},
}
"""Published settings for NYUv2, with sources in `phreg/evaluation/README.md`: DINOv3's, those of DVT, and of
PH-Reg, which took them over. Pictures are read at their own 480x640."""


def learning_rate(step: int, settings: Settings) -> float:
    """Computes the share of the highest learning rate at a step, from 0."""
    steps, warmup, start = settings.steps, settings.warmup, settings.warmup_start
    if settings.schedule == "dinov3":
        return dinov3_rate(step, steps, warmup, start, settings.final_share)
    return decay(step, steps, None) * warm_up(step, warmup, start)


def first_beta(step: int, settings: Settings) -> float:
    """Computes the first beta of AdamW at a step, from 0."""
    if settings.momentum is None:
        return 0.9
    if settings.schedule == "dinov3":
        return dinov3_beta(step, settings.steps, settings.warmup, *settings.momentum)
    return one_cycle_beta(step, settings.steps, *settings.momentum)
