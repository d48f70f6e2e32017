"""Every setting of a run, in one frozen tree.

A setting comes from four sources, weakest first: the defaults below, what its `method` implies, a recipe
file, and flags or keyword arguments. `phreg.methods.resolve` joins them and reports all problems at once. A
field's docstring is its command-line help, its documentation and part of its error.

    defaults ◄── METHODS[method].settings ◄── recipe.toml ◄── flags / keyword arguments  ──►  DistillConfig
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from phreg.deprecated import current_attribute
from phreg.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
TrainedReadout = Literal["plain", "naclip", "value-only"]
Role = str


def _check_pixels(size: Any) -> Any:
    """Checks all forms of a size together; pydantic would report one problem for each form."""
    sides = size if isinstance(size, tuple | list) else (size, size)
    try:
        whole = len(sides) == 2 and all(int(side) == float(side) > 0 for side in sides)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if size is not None and not whole:
        raise ValueError("should be one number of pixels, or height and width")
    return size


def _listed(sizes: tuple[int | tuple[int, int], ...]) -> str:
    return ", ".join(str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}" for size in sizes)


Size = Annotated[int | tuple[int, int], BeforeValidator(_check_pixels)]
"""Height and width of images in pixels, or one number for both."""


class Config(BaseModel):
    """Base of all sections: frozen, unknown keys refused, docstrings used as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ViewsConfig(Config):
    """The moved copies of an image. Their aligned features are averaged into the target."""

    count: PositiveInt = 10
    """Views per image. The first is always the unmoved image."""
    max_shift: Fraction = 0.15
    """Largest shift along each axis, as a fraction of the grid side. It is rounded to whole patches."""
    sampler: Literal["farthest-point", "uniform"] = "farthest-point"
    """How shifts are drawn. farthest-point: far from each other (the paper's code). uniform: independently
    (the paper's text)."""
    flip: Fraction = 0.5
    """Probability that a view is mirrored left to right."""
    fill: Literal["white", "black", "mean", "reflect", "replicate", "context", "valid-crop"] = "white"
    """What a shifted view shows outside the image. context: the pixels that lie there, taken from a larger
    crop. valid-crop: nothing; views are smaller crops."""
    subpatch: bool = False
    """Also shift by fractions of a patch. Features are then resampled (kornia), which blurs the target
    slightly."""
    scale: Fraction = 0.0
    """Largest relative change of scale of a view, e.g. 0.1. Other values than 0 need resampling (kornia)."""


class TargetConfig(Config):
    """Which features are distilled."""

    layer: int | None = None
    """Block whose output is distilled: counted from 0, or negative from the end. Unset means the last."""
    norm: bool = True
    """Apply the final norm to the tokens before they are compared."""
    teacher_readout: TrainedReadout = "plain"
    """Read-out of the teacher's last block. plain: the block as it is. naclip: key-key attention with a
    Gaussian (CLIP). value-only: values alone (MaskCLIP)."""
    student_readout: TrainedReadout = "plain"
    """Read-out of the student's last block. With any other than plain, the pooled output is not usable."""
    cache: bool = True
    """Cut each image the same in every epoch, and cache its target on disk in the run folder until the run
    ends. If off, every step has new crops and new views."""
    cache_limit: PositiveFloat | None = None
    """Most gigabytes that cached targets may take on disk. Targets of the images beyond it are made anew each
    time. Unset means as many as there are images."""
    native_size: bool = False
    """Resample the student's position embedding to the training size once, and save it at that size."""
    micro_batch: PositiveInt | None = None
    """Views per teacher forward. Unset means 16 on a CPU and 256 on a GPU. Halved when memory runs out."""


class LossConfig(Config):
    """Weights of the loss terms, all computed in fp32."""

    cosine: NonNegativeFloat = 1.0
    """Weight of 1 - mean cosine similarity between student and target patch tokens."""
    mse: NonNegativeFloat = 1.0
    """Weight of the mean squared error between student and target patch tokens."""
    relative_mse: NonNegativeFloat = 0.0
    """Weight of that error divided by the target's mean square, so that the scale of a model's features does
    not decide."""
    pooled: NonNegativeFloat = 1.0
    """Weight of the same two terms on the pooled output (CLS). Its target is the teacher's unmoved view."""
    relocation: NonNegativeFloat = 0.3
    """Weight of the relocation term, which moves sinks into the registers."""
    relocation_counts: Literal["share", "number"] = "share"
    """How that term counts sinks that are left on patches. share: by their share of those an image had.
    number: by their number (phreg 0.1)."""


class LoraConfig(Config):
    """Low-rank adapters (PEFT). They are merged into the weights at the end."""

    rank: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Rank of the adapters. 0: no adapters. auto: the largest at which they have at most 8 % of the model's
    weights. If set without unlock.roles, adapters train instead of the blocks."""
    alpha: PositiveFloat = 16.0
    """Scale: the update is alpha / rank times the low-rank product."""
    blocks: PositiveInt | Literal["all"] = 2
    """How many of the last blocks get adapters, or all."""


class UnlockConfig(Config):
    """Which weights train. Registers always do."""

    roles: tuple[Role, ...] = ("pos_embed", "patch_embed", "blocks")
    """Roles that train besides the registers: pos_embed, patch_embed, cls, norm, block.N, block.-N, blocks,
    head, vectors (norms, layer scales and biases of all blocks). With LoRA, blocks train only if a flag or
    recipe names them here."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters. They replace whole blocks, or train besides the blocks that roles name."""


class OptimConfig(Config):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer."""
    trust_region: bool = False
    """Measure before training what a step does to the features, and lower each role's learning rate until
    the first step moves them by no more than max_movement. Off, lr applies as it is."""
    max_movement: Annotated[float, Field(gt=0, lt=1)] = 2e-2
    """Largest mean cosine distance that the first step may move patch features or pooled outputs by."""
    lr: PositiveFloat = 1e-4
    """Learning rate at the first step. The trust region lowers it role by role."""
    final_lr: NonNegativeFloat = 2e-6
    """Learning rate at the last step; a role whose rate is lower ends at the same share of its own."""
    schedule: Literal["exponential", "cosine", "constant"] = "cosine"
    """Shape of the learning rate between lr and final_lr."""
    schedule_unit: Literal["step", "epoch"] = "step"
    """When the learning rate changes: at every step, or at every epoch (the paper)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up before the schedule."""
    weight_decay: NonNegativeFloat = 1e-2
    """Weight decay on everything that trains."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """Adam's decay rates."""
    momentum: Fraction = 0.9
    """SGD's momentum."""
    clip_norm: PositiveFloat | None = None
    """Largest gradient norm. Unset means no clipping."""
    accumulate: PositiveInt = 1
    """Batches accumulated into one optimizer step. Epochs still count passes over the images."""
    micro_batch: PositiveInt | None = None
    """Images per forward and backward pass of the student. Unset means a batch at once. Halved when memory
    runs out. The gradient is that of the whole batch."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights. The average is saved instead of the last
    weights. Unset means no average."""


class SinksConfig(Config):
    """The search for the causes of artifacts."""

    images: PositiveInt = 256
    """Training images used for the search, or all of them if there are fewer."""


class ChecksConfig(Config):
    """What a run must not make worse, on images it was not trained on. A run beyond a limit fails."""

    outlier_rate: Fraction = 0.001
    """Largest rise of the outlier rate (share of patch tokens), in the last block and in the block with the
    most outliers."""
    agreement: NonNegativeFloat = 0.01
    """Largest drop of the mean cosine to the reference."""
    drift: Fraction = 0.95
    """Lowest mean cosine between the pooled output and the original's."""


class DataConfig(Config):
    """How images are read."""

    limit: PositiveInt | Literal["all"] = 500
    """Most images to train on, evenly spaced over those there are; or all."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    image_column: str | None = None
    """Image column of a Hugging Face dataset. Unset means the first one."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Reader processes. Unset means one less than there are cores, at most 8."""
    max_megapixels: PositiveFloat = 89.0
    """Megapixels up to which an image is read at full size; a larger one is read at a half, a quarter or an
    eighth of it. This bounds the memory of each reader process: reading takes 24 bytes for each of these
    pixels at most (2.1 GB for 89). JPEG and JPEG 2000 are decoded at the reduced size; the other formats are
    decoded whole first, which that memory allows up to 5.7 times the megapixels for PNG, GIF, BMP, PPM and
    uncompressed TIFF, 1.9 times for compressed TIFF and 1.4 times for WEBP and AVIF (more in grey). A larger
    image counts as unreadable."""
    max_broken: Fraction = 0.05
    """Largest share of unreadable images. They are skipped and reported; a larger share stops the run."""


class MeasureConfig(Config):
    """The before/after table at the end of a run."""

    source: str | None = None
    """Other images to measure on, in any form that images takes. Unset sets some of the images aside."""
    images: Annotated[int, Field(ge=0)] = 32
    """Images to measure on, not trained on, or fewer if there are few. Fewer than 5 images serve for both. 0
    skips the table."""
    views: PositiveInt = 40
    """Views in the reference target of the agreement, or all different ones if there are fewer."""
    every: PositiveInt | None = None
    """Steps between measurements on these images during training. Unset means a sixteenth of the run, and at
    least 10 steps."""
    keep_best: bool = False
    """Measure during training too, and hand out the state that measured best, or the original model if none
    is better than it. Off, the last state is handed out."""


class Required(NamedTuple):
    """What a run cannot do without, and a recipe need not say."""

    model: str
    images: str
    output: str


class DistillConfig(Config):
    """All settings of `phreg distill`."""

    model: str | None = None
    """Model to patch: a hub id, timm or open_clip name, or local folder."""
    revision: str | None = None
    """Hub commit, branch or tag to pin."""
    images: str | None = None
    """Images to distil on: a folder, a text file of paths, tar shards, or a Hugging Face dataset. Required,
    here or in a recipe."""
    output: str | None = None
    """Run folder to write. Required, here or in a recipe."""
    method: str = "auto"
    """How registers are retrofitted (phreg.methods)."""
    force: bool = False
    """Train even if there is nothing to repair."""
    registers: Annotated[int, Field(ge=0)] | Literal["auto"] = 4
    """Register tokens to add. auto: as many as an image has sinks on average, or 1 where none were found. 0
    distils without registers (an ablation)."""
    register_init: Literal["triggers", "neutral", "randn", "trunc-normal", "zeros"] = "triggers"
    """Initial values of the registers. triggers: the tokens that trigger the sinks, or randn without a sink.
    neutral: the same, but without a sink the mean of all patch tokens that enter the blocks, fitted until
    the model gives the features that it gave without registers. randn: a normal distribution of std
    1 / sqrt(width). trunc-normal: a truncated one of std 0.02. zeros: zeros."""
    steps: PositiveInt | None = None
    """Optimizer steps. Unset means that epochs decides."""
    epochs: PositiveInt | None = None
    """Passes over the images. Unset means that steps decides, or the method."""
    batch_size: PositiveInt = 16
    """Images per process and batch."""
    size: Size | None = None
    """Size of the images in pixels: one number for a square, or height and width. Unset means the model's
    own size."""
    mixed_sizes: tuple[Size, ...] = ()
    """Other sizes to train at, besides size. Each image has one size, by turns, and each batch has images of
    one size. On the command line each number is a square."""
    mean: tuple[float, float, float] | None = None
    """Mean that images are normalised with, RGB on a scale of 0 to 1. Unset takes it from the model or its
    image processor, or else the usual one of the model's library, with a warning."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation that images are normalised with, RGB on a scale of 0 to 1. Unset works as for
    mean."""
    seed: int = 0
    """Seed of registers, image order, crops and views."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints. The last two checkpoints stay on disk."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1 or mps. Unset means the best one available."""
    precision: Literal["fp32", "bf16"] | None = None
    """Autocast precision. Unset means bf16 where the hardware computes in it, else fp32. Trained weights and
    losses stay in fp32. A half-precision instance is rounded to its own precision at the end."""
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which matrices of the blocks that do not train are kept while others do, in student and
    teacher. bf16 halves their memory and needs precision = bf16, under which products round them anyway: then
    losses and gradients stay the same to the bit. It costs precision where a run measures as it trains, which
    is then in bf16 too. Results are made of the original weights."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    checkpoint_activations: bool | Literal["auto"] = "auto"
    """Keep only the input of each block of the student in the forward pass, and compute the block again in
    the backward pass. This takes less memory, and about a third longer for the student; gradients stay the
    same. auto: only from where a training step runs out of memory on a GPU."""
    keep_freed_memory: bool = True
    """On a CPU, let the process keep freed memory instead of returning it to the kernel (glibc). This saves
    page faults, most with large images."""
    deterministic: bool = False
    """On a GPU, use only deterministic kernels during the run, so that a resumed run is bit-identical. This
    is slower, and an error where there is no such kernel. On a CPU, runs are always bit-identical."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers to write to, besides log.jsonl."""
    views: ViewsConfig = ViewsConfig()
    target: TargetConfig = TargetConfig()
    loss: LossConfig = LossConfig()
    unlock: UnlockConfig = UnlockConfig()
    optim: OptimConfig = OptimConfig()
    sinks: SinksConfig = SinksConfig()
    checks: ChecksConfig = ChecksConfig()
    data: DataConfig = DataConfig()
    measure: MeasureConfig = MeasureConfig()

    @model_validator(mode="after")
    def _lora_is_reached(self) -> "DistillConfig":
        readout = self.target.student_readout
        if self.unlock.lora.rank and readout != "plain":
            raise ValueError(
                f"unlock.lora.rank: a {readout} read-out takes the last block apart, past its LoRA; "
                'use target.student_readout = "plain" or unlock whole blocks'
            )
        return self

    @model_validator(mode="after")
    def _positions_of_one_size(self) -> "DistillConfig":
        if self.mixed_sizes and self.target.native_size:
            raise ValueError(
                "target.native_size saves the position embedding at one size, found mixed_sizes "
                f"{_listed(self.mixed_sizes)} too; set target.native_size = false, or leave out mixed_sizes"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "DistillConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps and epochs say the same in two ways, found {self.steps} and {self.epochs}; keep one"
            )
        return self

    def required(self) -> Required:
        """Gives what a run cannot do without.

        Raises:
            ConfigError: Any of it was not given; all that is missing is listed.
        """
        if self.model is not None and self.images is not None and self.output is not None:
            return Required(self.model, self.images, self.output)
        missing = [name for name in Required._fields if getattr(self, name) is None]
        raise ConfigError(
            "settings", [f"{name}: not given; name it by flag, argument or recipe" for name in missing]
        )

    def num_steps(self, batches_per_epoch: int) -> int:
        """Counts the optimizer steps of a run, at least 1: as steps says, or as epochs does.

        Args:
            batches_per_epoch: Global batches that one pass over the images makes. Where neither steps nor
                epochs is set, there is one pass.
        """
        if self.steps is not None:
            return self.steps
        epochs = 1 if self.epochs is None else self.epochs
        return max(1, epochs * batches_per_epoch // self.optim.accumulate)


def __getattr__(name: str) -> Any:
    """Finds a class by its old name, with a warning."""
    if (new := current_attribute(__name__, name)) is not None:
        return globals()[new]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
