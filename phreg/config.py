"""Every setting of a run, in one frozen tree.

A setting comes from, weakest first: the defaults below, what its `method` implies, a recipe file, and flags
or keyword arguments. All four meet in `phreg.methods.resolve`, which gathers every problem before it
complains. A field's docstring is its command-line help, its documentation and part of its error.

    defaults ◄── METHODS[method].settings ◄── recipe.toml ◄── flags / keyword arguments  ──►  DistillConfig
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from phreg.errors import ConfigError
from phreg.parsing import parse_toml

Fraction = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
Readout = Literal["plain", "naclip", "value-only"]
Role = str


def _check_pixels(size: Any) -> Any:
    """Checks a size for all its forms together, which pydantic would complain of one by one."""
    sides = size if isinstance(size, tuple | list) else (size, size)
    try:
        whole = len(sides) == 2 and all(int(side) == float(side) > 0 for side in sides)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if size is not None and not whole:
        raise ValueError("should be one number of pixels, or height and width")
    return size


Size = Annotated[int | tuple[int, int], BeforeValidator(_check_pixels)]
"""Height and width of images in pixels, or one number for both."""


class Config(BaseModel):
    """Base of all sections: frozen, unknown keys refused, docstrings kept as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ViewsConfig(Config):
    """The moved copies of an image whose aligned features are averaged into the target."""

    count: PositiveInt = 10
    """Views per image; the first is always the image as it is."""
    max_shift: Fraction = 0.15
    """Largest shift along each axis, as a fraction of the grid side, rounded to whole patches."""
    sampler: Literal["farthest-point", "uniform"] = "farthest-point"
    """How shifts are drawn: spread out over the range (the paper's code) or independently (the paper's
    text)."""
    flip: Fraction = 0.5
    """Probability that a view is mirrored left to right."""
    fill: Literal["white", "black", "mean", "reflect", "replicate", "surroundings", "valid-crop"] = "white"
    """What a shifted view shows outside the image; surroundings: what lies there, the image being the middle
    of a larger crop; valid-crop: nothing, views being smaller crops."""
    subpatch: bool = False
    """Shift by fractions of a patch too; features are then resampled (kornia), which blurs the target
    slightly."""
    scale: Fraction = 0.0
    """Largest relative change of scale of a view, e.g. 0.1; 0 keeps views exact. Needs resampling
    (kornia)."""


class TargetConfig(Config):
    """Which features are distilled."""

    layer: int | None = None
    """Block whose output is distilled, 0-based or negative from the end; unset means the last."""
    norm: bool = True
    """Apply the final norm to the tokens first."""
    teacher_readout: Readout = "plain"
    """How the teacher's last block is read: plain, naclip (CLIP: key-key attention with a Gaussian),
    value-only (MaskCLIP)."""
    student_readout: Readout = "plain"
    """How the student's last block is read; anything but plain makes its pooled output meaningless in that
    reading."""
    keep: bool = True
    """Cut each image the same in every epoch, and keep its target on disk in the run folder until the run
    ends; off, every step has new crops and new views."""
    native_size: bool = False
    """Resample the student's position embedding to the training size once, and store it so."""
    micro_batch: PositiveInt | None = None
    """Views per teacher forward; unset means 16 on a CPU and 256 on a GPU, halved when memory runs out."""


class LossConfig(Config):
    """Weights of the loss terms, all computed in fp32."""

    cosine: NonNegativeFloat = 1.0
    """Weight of 1 - mean cosine similarity between student and target patch tokens."""
    mse: NonNegativeFloat = 1.0
    """Weight of the mean squared error between student and target patch tokens."""
    pooled: NonNegativeFloat = 1.0
    """Weight of the same two terms on the pooled output (CLS), against the unmoved teacher view."""
    relocation: NonNegativeFloat = 0.3
    """Weight of the relocation term, where sinks with known causes are moved into the registers."""


class LoraConfig(Config):
    """Low-rank adapters (PEFT); they are merged into the weights at the end."""

    rank: PositiveInt | None = None
    """Rank of the adapters; unset means no LoRA. Set, and unlock.roles not: adapters train instead of the
    blocks that would."""
    alpha: PositiveFloat = 16.0
    """Scale: the update is alpha / rank times the low-rank product."""
    blocks: PositiveInt = 2
    """How many of the last blocks get adapters."""


class UnlockConfig(Config):
    """Which weights train. Registers always do."""

    roles: tuple[Role, ...] = ("pos_embed", "patch_embed", "blocks")
    """Roles that train besides the registers: pos_embed, patch_embed, cls, norm, block.N, block.-N, blocks,
    head. Given by flag or recipe, they train beside LoRA as well; left out, LoRA takes the blocks' place."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters instead of whole blocks or, where roles name blocks, besides them."""


class OptimConfig(Config):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer."""
    lr: PositiveFloat = 1e-4
    """Learning rate at the first step."""
    final_lr: NonNegativeFloat = 2e-6
    """Learning rate at the last step."""
    schedule: Literal["exponential", "cosine", "constant"] = "cosine"
    """How the learning rate goes from lr to final_lr."""
    schedule_unit: Literal["step", "epoch"] = "step"
    """Whether the learning rate changes at every step, or at every epoch (the paper)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up before the schedule."""
    weight_decay: NonNegativeFloat = 1e-2
    """Weight decay on everything that trains."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """Adam's decay rates."""
    momentum: Fraction = 0.9
    """SGD's momentum."""
    clip_norm: PositiveFloat | None = None
    """Largest gradient norm; unset means no clipping."""
    accumulate: PositiveInt = 1
    """Batches accumulated into one optimizer step; epochs count passes over the images all the same."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, kept instead of the last ones; unset means
    none."""


class SinksConfig(Config):
    """How the causes of artifacts are found."""

    images: PositiveInt = 256
    """Images to find them on, of those that are trained on (fewer when there are few)."""


class GateConfig(Config):
    """What a run may not make worse, measured on images it was not trained on; beyond, it fails."""

    outlier_rate: Fraction = 0.001
    """Largest rise of the outlier rate, a share of all patch tokens: in the last block, and in the block with
    most."""
    agreement: NonNegativeFloat = 0.01
    """Largest fall of the mean cosine to the reference."""
    drift: Fraction = 0.95
    """Lowest mean cosine of the pooled output to the original's."""


class DataConfig(Config):
    """How images are read."""

    limit: PositiveInt | Literal["all"] = 500
    """Most images to train on, spread evenly over those there are; or all."""

    split: str = "train"
    """Split of a Hugging Face dataset."""
    image_column: str | None = None
    """Column of a Hugging Face dataset that holds the images; unset means the first image column."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Reader processes; unset means up to 8, one less than there are cores."""
    max_megapixels: PositiveFloat = 89.0
    """Megapixels up to which an image is read at full size; a larger one is read at a half, a quarter or an
    eighth of it. This bounds the memory of each reader process: reading takes 24 bytes for each of these
    pixels at most (2.1 GB for 89). JPEG and JPEG 2000 are decoded at the reduced size; the other formats are
    decoded whole first, which that memory allows up to 5.7 times the megapixels for PNG, GIF, BMP, PPM and
    uncompressed TIFF, 1.9 times for compressed TIFF and 1.4 times for WEBP and AVIF (more in grey). A larger
    image counts as unreadable."""
    max_broken: Fraction = 0.05
    """Share of unreadable images that are skipped and reported; more stop the run."""


class MeasureConfig(Config):
    """The before/after table at the end of a run."""

    source: str | None = None
    """Other images to measure on, in any form of images; unset sets some of the images aside."""
    images: Annotated[int, Field(ge=0)] = 32
    """Images to measure on, not trained on (fewer when there are few; fewer than 5 are both trained and
    measured on); 0 skips the table."""
    views: PositiveInt = 40
    """Views in the reference target that agreement is measured against, or all there are, if fewer."""


class DistillConfig(Config):
    """Everything that decides the outcome of `phreg distill`, and where it runs."""

    model: str | None = None
    """Model to patch: a hub id, timm or open_clip name, or local folder."""
    revision: str | None = None
    """Hub commit, branch or tag to pin."""
    images: str | None = None
    """Images to distil on: a folder, a text file of paths, tar shards, or a Hugging Face dataset; needed,
    here or in a recipe."""
    output: str | None = None
    """Run folder to write; needed, here or in a recipe."""
    method: str = "relocate"
    """How registers are retrofitted (phreg.methods)."""
    force: bool = False
    """Go on where there is nothing to repair."""
    registers: Annotated[int, Field(ge=0)] = 4
    """Register tokens to add; 0 distils without (an ablation)."""
    register_init: Literal["triggers", "randn", "trunc-normal", "zeros"] = "triggers"
    """How registers start: as what sets the sinks off (randn where none were found), randn / sqrt(width),
    truncated normal of std 0.02, or zeros."""
    steps: PositiveInt | None = None
    """Optimizer steps; unset means as epochs says."""
    epochs: PositiveInt | None = None
    """Passes over the images; unset means as steps says, or as the method implies."""
    batch_size: PositiveInt = 16
    """Images per process and batch."""
    size: Size | None = None
    """Size of the images in pixels: one number for a square, or height and width; unset means the model's
    own."""
    mean: tuple[float, float, float] | None = None
    """Mean that images are normalised with, RGB on a scale of 0 to 1; unset means as the model or its image
    processor says, or else as is usual for its kind, with a warning."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation that images are normalised with, RGB on a scale of 0 to 1; unset likewise."""
    seed: int = 0
    """Seed of registers, order, crops and views."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints; the last two are kept."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1, mps; unset means the best there is."""
    precision: Literal["fp32", "bf16"] | None = None
    """Autocast precision; unset means bf16 where the hardware computes in it, else fp32. Weights that train
    and losses stay fp32; a half-precision instance is rounded to its own precision at the end."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    keep_freed_memory: bool = True
    """On a CPU, let the process keep freed memory instead of returning it to the kernel (glibc); faster
    the larger the images, since fewer pages are faulted in anew."""
    deterministic: bool = False
    """On a GPU, use deterministic kernels alone during the run, so that a resumed run is bit-identical there
    too; slower, and an error where there is no such kernel. On a CPU runs are bit-identical anyway."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers to write to besides log.jsonl."""
    views: ViewsConfig = ViewsConfig()
    target: TargetConfig = TargetConfig()
    loss: LossConfig = LossConfig()
    unlock: UnlockConfig = UnlockConfig()
    optim: OptimConfig = OptimConfig()
    sinks: SinksConfig = SinksConfig()
    gate: GateConfig = GateConfig()
    data: DataConfig = DataConfig()
    measure: MeasureConfig = MeasureConfig()

    @model_validator(mode="after")
    def _lora_is_reached(self) -> "DistillConfig":
        readout = self.target.student_readout
        if self.unlock.lora.rank is not None and readout != "plain":
            raise ValueError(
                f"unlock.lora.rank: a {readout} read-out takes the last block apart, past its LoRA; "
                'use target.student_readout = "plain" or unlock whole blocks'
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "DistillConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps and epochs say the same in two ways, found {self.steps} and {self.epochs}; keep one"
            )
        return self


AnyConfig = TypeVar("AnyConfig", bound=Config)


def read_settings(
    recipe: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Lays overrides over a recipe.

    Args:
        recipe: Name of a shipped recipe, or path of a TOML file.
        overrides: Settings that win over the recipe, by dotted key (`{"optim.lr": 1e-3}`) or nested.

    Returns:
        What to call the source of the settings in messages, and the settings by dotted key, unchecked.

    Raises:
        ConfigError: The recipe is not there, or not TOML.
    """
    given = flatten(overrides or {})
    if recipe is None:
        return "settings", given
    path = find_recipe(recipe)
    return os.fspath(path), flatten(read_toml(path)) | given


def validate(settings: Mapping[str, Any], *, source: str) -> DistillConfig:
    """Checks settings given by dotted key and builds the tree.

    Raises:
        ConfigError: Any setting is wrong; all problems are listed.
    """
    return build(DistillConfig, settings, source=source)


def build(kind: type[AnyConfig], settings: Mapping[str, Any], *, source: str) -> AnyConfig:
    """Checks settings given by dotted key and builds a tree of any kind, as `validate` does.

    Raises:
        ConfigError: Any setting is wrong; all problems are listed.
    """
    known = fields(kind)
    problems = [_unknown(key, known) for key in settings if key not in known]
    try:
        tree = _nest({key: value for key, value in settings.items() if key in known})
        config = kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(source, problems + [_problem(details) for details in error.errors()]) from error
    if problems:
        raise ConfigError(source, problems)
    return config


def fields(model: type[BaseModel] = DistillConfig, prefix: str = "") -> dict[str, Any]:
    """Lists every setting by dotted key, as pydantic field descriptions."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= fields(info.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = info
    return found


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested settings into dotted keys; keys that are dotted already stay."""

    def items() -> Iterator[tuple[str, Any]]:
        for key, value in settings.items():
            if isinstance(value, BaseModel):
                value = value.model_dump(exclude_unset=True)
            if isinstance(value, Mapping):
                yield from flatten(value, f"{prefix}{key}.").items()
            else:
                yield prefix + key, value

    return dict(items())


def to_toml(config: DistillConfig) -> str:
    """Writes the resolved configuration as TOML that reads back to the same tree."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def recipes() -> dict[str, Path]:
    """Lists the shipped recipes by name."""
    packaged = Path(str(resources.files("phreg"))) / "recipes"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("[!.]*.toml"))}


def find_recipe(recipe: str | os.PathLike[str]) -> Path:
    """Finds a shipped recipe by name, or a recipe file by path.

    Raises:
        ConfigError: There is neither.
    """
    shipped = recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    if Path(recipe).is_file():
        return Path(recipe)
    near = difflib.get_close_matches(str(recipe), shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped)}"
    raise ConfigError("settings", [f"recipe: no recipe or file {str(recipe)!r}; {hint}"])


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        ConfigError: It cannot be read, or is not TOML.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(os.fspath(path), [f"cannot be read: {error}"]) from error
    except ValueError as error:
        raise ConfigError(os.fspath(path), [f"not TOML: {error}"]) from error


def _nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1) or [
        leaves[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1)
    ]
    return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")


def _problem(details: Any) -> str:
    key = ".".join(
        str(part)
        for part in details["loc"]
        if isinstance(part, str) and "[" not in part and part != "NoneType"
    )
    message = details["msg"].removeprefix("Value error, ")
    if not key:
        return message
    message = message.replace("Input should be", "should be").partition(", unable")[0]
    return f"{key}: {message}, found {details['input']!r}"
