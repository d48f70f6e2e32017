"""What phreg asks of a vision transformer, whatever library it comes from.

A `Backbone` wraps the user's model and never copies or converts it. An adapter (one per library) answers a
few questions about the model: which modules are the blocks, which parameters play which role, how to run it
at another size, where registers go in. Everything else, reading dense features first of all, is done here,
once, with forward hooks on the blocks.

    images ──run──► [embed | blocks (tapped) | norm | pool] ──► pooled
                              └──► tokens of any block ──norm, projection──► patches (batch, rows, cols, dim)

Registers are added in place and stay inside the block stack: outside of it the model sees the sequence it
always saw.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from phreg.errors import PhregError
from phreg.low_rank import Factors
from phreg.tokens import TokenLayout

Library = Literal["transformers", "timm", "open_clip"]
Readout = Literal["plain", "naclip", "value-only", "clearclip", "sclip"]

Triple = tuple[float, float, float]
"""A number for each of red, green and blue."""

NORMALISATION = "_phreg_normalisation"
"""Attribute of a model that holds mean and standard deviation of its input, if they were given."""

READOUT, TRAINED_READOUT = "phreg_readout", "phreg_trained_readout"
"""Attributes of a model that say how its last block is read, and how it was when phreg trained it."""

UNIT_MOVER = "phreg_unit_mover"
"""Attribute of a model's first block that keeps what moves hidden units into test-time registers."""

COMPUTE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that tokens have. Quantised weights are packed in others, and unpacked as they are used."""


class Features(NamedTuple):
    """What a backbone makes of a batch of images."""

    patches: Float[Tensor, "batch rows cols dim"]
    """Dense features, laid out as the image lies, registers and prefix left out."""
    pooled: Float[Tensor, "batch dim"]
    """The model's own global output: pooled or CLS, projected where the model projects it."""


@dataclass(frozen=True)
class Spec:
    """What does not change about a model when registers are added.

    Attributes:
        library: The library the model's class comes from.
        family: Name of the architecture in that library, e.g. `dinov2`, `clip`, `VisionTransformer`.
        patch_size: Pixels per patch, (height, width).
        width: Channels of a token.
        num_heads: Attention heads per block.
        num_prefix: Tokens before the patches as the model came: CLS, distillation token, native registers.
        input_size: Pixels the model was made for, (height, width).
        any_size: Whether it takes other multiples of the patch size.
        mean: Mean of the input normalisation, RGB, on a scale of 0 to 1.
        std: Standard deviation of the input normalisation, RGB.
    """

    library: Library
    family: str
    patch_size: tuple[int, int]
    width: int
    num_heads: int
    num_prefix: int
    input_size: tuple[int, int]
    any_size: bool
    mean: Triple
    std: Triple

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the input size."""
        return self.input_size[0] // self.patch_size[0], self.input_size[1] // self.patch_size[1]


@runtime_checkable
class Attention(Protocol):
    """The parts of one block's self-attention, for read-outs and attention maps that recompute it.

    `queries`, `keys` and `values` take normed tokens (batch, tokens, width) and return (batch, heads, tokens,
    head_dim).
    """

    scale: float

    @property
    def module(self) -> nn.Module:
        """The attention itself, whose first argument is normed tokens."""
        ...

    def norm(self, tokens: Tensor) -> Tensor:
        """Applies the norm before attention."""
        ...

    def queries(self, tokens: Tensor) -> Tensor:
        """Projects normed tokens to queries."""
        ...

    def keys(self, tokens: Tensor) -> Tensor:
        """Projects normed tokens to keys."""
        ...

    def values(self, tokens: Tensor) -> Tensor:
        """Projects normed tokens to values."""
        ...

    def out(self, tokens: Tensor) -> Tensor:
        """Applies the output projection to merged heads (batch, tokens, width)."""
        ...


@dataclass(frozen=True)
class Mlp:
    """One block's MLP, taken apart hidden unit by hidden unit.

        tokens ──up──► activation, gate ──(inner norm)──► hidden units ──down──► tokens

    A hidden unit is read or edited by a forward pre-hook on `down`, and fed by its `rows` alone. Ahead of the
    inner norm, unit u depends on its own rows alone: zeroed, they make it one constant for all tokens, and
    exactly zero where the activation of zero is zero or a gate multiplies. Behind it, what `down` receives
    of unit u also depends on the token's other units, and keeps the norm's bias.

    Attributes:
        down: The layer whose input (batch, tokens, hidden) are the hidden units; column u of its weight is
            what unit u writes.
        up: The layers that feed the hidden units. One with `hidden` outputs in a plain MLP, where output u is
            the unit's pre-activation; where the MLP is gated, two of these, or one with twice as many outputs
            of which u and hidden + u belong to unit u. Which of the two is the gate differs between models.
        norm: The norm between activation and `down`; None without.
    """

    down: nn.Linear
    up: tuple[nn.Linear, ...]
    norm: nn.Module | None = None

    @classmethod
    def of(cls, up: Sequence[nn.Module], down: nn.Module, norm: nn.Module | None = None) -> "Mlp | None":
        """Puts the parts together; returns None where a layer is not plainly linear, such as PEFT's.

        An identity counts as no norm.
        """
        plain = tuple(layer for layer in up if type(layer) is nn.Linear)
        if len(plain) < len(up) or type(down) is not nn.Linear:
            return None
        return cls(down, plain, None if isinstance(norm, nn.Identity) else norm)

    @property
    def num_units(self) -> int:
        """Hidden units."""
        return self.down.in_features

    def rows(self, units: Int[Tensor, " units"]) -> list[tuple[nn.Parameter, Int[Tensor, " rows"]]]:
        """Finds all that feeds some units: parameters, and which rows of each.

        Weights and biases of every layer of `up`, by indices into their first axis: the units in the order
        given and, in a layer that holds both halves of a gated MLP, once more for the second half.
        """
        found = []
        for layer in self.up:
            rows = torch.cat([units + start for start in range(0, layer.out_features, self.num_units)])
            found += [(parameter, rows) for parameter in layer.parameters()]
        return found


class Backbone(nn.Module, ABC):
    """A vision transformer seen through the questions phreg asks.

    Args:
        model: The user's model, of its ordinary class; patched in place, never copied.
        spec: What was found out about it.
        assumed: What its normalisation was taken from, if neither the model nor its files say; None where
            they do.
    """

    def __init__(self, model: nn.Module, spec: Spec, assumed: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.assumed = assumed
        """What the input normalisation is assumed from; None where it is known."""
        if NORMALISATION in vars(model):
            self.set_normalisation(*vars(model)[NORMALISATION])

    # -- what an adapter answers
    # ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""

    @property
    def first_block_input(self) -> nn.Module:
        """The first module that takes in the whole sequence: the norm before the blocks, or a block."""
        return self.blocks[0]

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm after the last block (an identity where there is none)."""

    @property
    def projection(self) -> Tensor | None:
        """The (width, dim) matrix of a CLIP-type model from tokens to the joint space; None elsewhere."""
        return None

    @property
    def class_tokens(self) -> tuple[str, ...]:
        """Names of the tokens ahead of all registers: `CLS`, and `distillation` where there is one."""
        return ("CLS",)[: self.spec.num_prefix]

    @property
    @abstractmethod
    def num_registers(self) -> int:
        """Registers phreg added."""

    @property
    @abstractmethod
    def registers(self) -> nn.Parameter | None:
        """The parameter that holds the added registers, (1, registers, width); None where there are none.

        Where a class has native registers of its own (timm), this parameter holds both, native ones first.
        """

    @abstractmethod
    def insert_registers(self, tokens: Float[Tensor, "registers width"]) -> None:
        """Puts registers between prefix and patches, after position embedding and before any norm."""

    @abstractmethod
    def remove_registers(self) -> None:
        """Undoes `insert_registers` exactly."""

    @abstractmethod
    def run(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Runs the model as its library does, at the images' size, and returns its pooled output."""

    def logits(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:  # noqa: ARG002
        """Runs the model with its own classifier.

        Raises:
            PhregError: It has none.
        """
        raise PhregError(
            f"class scores asked of {self.describe()}, which has no classifier; use a probe or neighbours"
        )

    @abstractmethod
    def roles(self) -> dict[str, list[str]]:
        """Names the parameters of `model` by role.

        Roles are `registers`, `pos_embed`, `patch_embed`, `cls`, `norm` (after the blocks, and before them
        where there is one), `block.0` to `block.N`, and `head` (pooling, projection, classifier). Parameters
        outside the vision tower, such as a text tower, have no role.
        """

    @abstractmethod
    def attention(self, index: int) -> Attention:
        """Takes apart the self-attention of one block."""

    @abstractmethod
    def mlp(self, index: int) -> Mlp | None:
        """Takes apart the MLP of one block; None where it is not one that the adapter knows for certain.

        Such are several MLPs side by side, one fused with attention, or one whose layers are wrapped (PEFT).
        """

    def require_registers(self) -> nn.Parameter:
        """Finds the added registers, as `registers` does.

        Raises:
            PhregError: There are none.
        """
        if self.registers is None:
            raise PhregError(f"asked for the registers of {self.describe()}, which has none; add some first")
        return self.registers

    def require_mlp(self, index: int) -> Mlp:
        """Takes apart the MLP of one block, as `mlp` does.

        Raises:
            PhregError: It is not one that the adapter knows for certain.
        """
        mlp = self.mlp(index)
        if mlp is None:
            raise PhregError(
                f"hidden units asked of block {index} of {self.describe()}, whose MLP is wrapped (PEFT), "
                "fused with attention or one of several side by side; unwrap it, or ask another block"
            )
        return mlp

    def to_joint(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens dim"]:
        """Takes tokens behind the final norm, each by itself, to the space shared with text (CLIP, SigLIP).

        Raises:
            PhregError: It has no such space, or tokens get there only together.
        """
        if self.projection is None:
            raise PhregError(
                f"tokens matched with text asked of {self.describe()}, which has no projection from its "
                "tokens to a space shared with text; use a CLIP or SigLIP model, its text tower included"
            )
        return tokens @ self.projection

    def set_input_size(self, size: int | tuple[int, int]) -> None:
        """Resamples the stored position embedding once, so that `size` becomes the model's own size.

        Raises:
            PhregError: The model cannot do so.
        """
        raise PhregError(
            f"cannot change the native size of {self.describe()} to {size}; leave target.native_size off"
        )

    def find_normalisation(self) -> None:
        """Looks up how images are normalised, where the model came from; may ask the hub for one small file.

        Without an answer it stays as it is assumed. Most models say it themselves, and look nowhere.
        """

    def built_of(self) -> Mapping[str, Any]:
        """Gives the library's own config of the model, as JSON holds it; empty where its modules tell all."""
        return {}

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames some or all of the model's tensors to what its library writes to disk."""
        return dict(tensors)

    def disk_state(self) -> dict[str, Tensor]:
        """Returns the model's tensors under the names its library writes to disk."""
        return self.to_disk(self.model.state_dict())

    def load_disk_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors named as `disk_state` names them back into the model; others stay as they are.

        Raises:
            PhregError: A name or a shape does not fit.
        """
        load_tensors(self.model, tensors, self.describe())

    def vision_tower(self) -> "Backbone":
        """Wraps the vision tower without what is around it: a head, a projection, a text tower, a decoder."""
        return self

    # -- what follows for every library
    # --------------------------------------------------------------------------------

    @property
    def readout(self) -> Readout:
        """How the last block is read; set by `phreg.backbones.readout.set_readout`.

        Like the next it is kept on the model, so that an instance of its ordinary class is known by it too.
        """
        return vars(self.model).get(READOUT, "plain")

    @readout.setter
    def readout(self, readout: Readout) -> None:
        _note(self.model, READOUT, readout)

    @property
    def trained_readout(self) -> Readout:
        """How its last block was read when phreg trained it, which is how its dense features are meant."""
        return vars(self.model).get(TRAINED_READOUT, "plain")

    @trained_readout.setter
    def trained_readout(self, readout: Readout) -> None:
        _note(self.model, TRAINED_READOUT, readout)

    def set_normalisation(self, mean: Triple, std: Triple) -> None:
        """Sets how images are normalised for the model, from here on known."""
        self.spec = replace(self.spec, mean=mean, std=std)
        self.assumed = None

    def note_normalisation(self) -> None:
        """Notes the normalisation on the model, so that an instance of its ordinary class is known by it."""
        vars(self.model)[NORMALISATION] = (self.spec.mean, self.spec.std)

    adapter: Path | None = None
    """The adapter that made the model what it is; set by `phreg.formats.adapter.apply_adapter`."""

    low_rank: Mapping[str, Factors] = {}
    """What training added to weights at low rank, by their names in the model."""

    def tower_state(self) -> dict[str, Tensor]:
        """Returns the tensors of the embeddings and the blocks, as the tower alone names them on disk.

        They are the same whatever stands around the tower, and whether or not its last norm was pruned.
        """
        tower = self.vision_tower()
        own, roles = tower.model.state_dict(), tower.roles()
        inner = [name for role, names in roles.items() if role not in ("norm", "head") for name in names]
        return tower.to_disk({name: own[name] for name in inner})

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What images must come in: the type of the weights that meet them first and are not packed."""
        first = map(self.model.get_parameter, self.roles()["patch_embed"])
        return first_unpacked(chain(first, self.blocks[0].parameters())).dtype

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Names of all tokens ahead of the patches, in order; native registers count before phreg's."""
        count = self.spec.num_prefix + self.num_registers - len(self.class_tokens)
        return (*self.class_tokens, *(f"register {number}" for number in range(1, count + 1)))

    def owners(self, role: str) -> list[nn.Module]:
        """Finds the modules that hold the parameters of a role."""
        names = [name.rpartition(".")[0] for name in self.roles()[role]]
        return [self.model.get_submodule(name) for name in dict.fromkeys(names)]

    def describe(self) -> str:
        """Names the model for messages."""
        return f"{type(self.model).__name__} ({self.spec.library}, {self.spec.family})"

    def image_size(self, size: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """Gives height and width of the images asked for, in pixels, and checks that the model takes them.

        Args:
            size: Height and width, or one number for both; None means the model's own.

        Raises:
            PhregError: It is no multiple of the patch, or the model takes its own size only.
        """
        height, width = (
            self.spec.input_size if size is None else (size, size) if isinstance(size, int) else size
        )
        self.check_size((height, width))
        return height, width

    def check_size(self, size: tuple[int, int]) -> None:
        """Checks that the model takes images of a size.

        Raises:
            PhregError: It is no multiple of the patch, or the model takes its own size only.
        """
        for side, patch in zip(size, self.spec.patch_size, strict=True):
            if side % patch or not side:
                below, above = side // patch * patch, math.ceil(side / patch) * patch
                raise PhregError(
                    f"size {side} asked of {self.describe()}, whose patches are {patch} pixels; "
                    f"use a multiple, such as {below or above} or {above or patch}"
                )
        if not self.spec.any_size and size != self.spec.input_size:
            raise PhregError(
                f"size {size[0]}x{size[1]} asked of {self.describe()}, which takes only its own size; "
                f"use {self.spec.input_size[0]}x{self.spec.input_size[1]}"
            )

    def layout(self, images: Float[Tensor, "batch 3 height width"]) -> TokenLayout:
        """Says where each kind of token lies inside the block stack, for images of this size."""
        self.check_size((images.shape[-2], images.shape[-1]))
        grid = (images.shape[-2] // self.spec.patch_size[0], images.shape[-1] // self.spec.patch_size[1])
        return TokenLayout(self.spec.num_prefix, self.num_registers, grid)

    def block_index(self, layer: int | None) -> int:
        """Turns a block number, negative from the end, None for the last, into an index.

        Raises:
            PhregError: There is no such block.
        """
        depth = len(self.blocks)
        index = depth - 1 if layer is None else layer + depth if layer < 0 else layer
        if not 0 <= index < depth:
            raise PhregError(
                f"block {layer} asked of {self.describe()}, which has {depth}; use -{depth} to {depth - 1}"
            )
        return index

    @contextmanager
    def tap(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collects what blocks put out, by block index, registers included, while the model runs."""
        found: dict[int, Tensor] = {}
        blocks = self.blocks
        # Ahead of any hook that strips the registers off the last block's output.
        handles = [
            blocks[layer].register_forward_hook(_Collect(found, layer), prepend=True) for layer in layers
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def block_tokens(
        self, images: Float[Tensor, "batch 3 height width"], layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """Runs the model and returns some blocks' raw output (batch, tokens, width), registers included."""
        with self.tap(layers) as found:
            self.run(images)
        return found

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], layer: int | None = None, norm: bool = True
    ) -> Features:
        """Reads dense and pooled features in one pass.

        Args:
            images: Normalised images, sides a multiple of the patch size.
            layer: Block to read; None means the last.
            norm: Whether to apply the model's final norm to the patch tokens.

        Returns:
            Patch features of width `spec.width`, or of the joint space where a CLIP read-out is set.
        """
        index, layout = self.block_index(layer), self.layout(images)
        with self.tap([index]) as found:
            pooled = self.run(images)
        patches = layout.to_grid(found[index])
        if norm:
            patches = self.final_norm(patches)
        if self.readout != "plain" and self.projection is not None:
            patches = patches @ self.projection
        return Features(patches, pooled)


@dataclass(frozen=True)
class _Collect:
    """A forward hook that keeps a block's output; an object, so that models which carry it can be copied."""

    found: dict[int, Tensor]
    layer: int

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.found[self.layer] = output[0] if isinstance(output, tuple) else output


def _note(model: nn.Module, attribute: str, readout: Readout) -> None:
    """Notes a read-out on a model; a model that is read plainly carries no mark of phreg's."""
    vars(model).pop(attribute, None)
    if readout != "plain":
        vars(model)[attribute] = readout


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], described: str) -> None:
    """Gives a model named tensors; parameters and buffers stay the same objects, in new memory.

    Who holds what they held before, such as a twin of the model, keeps it.

    Raises:
        PhregError: A name is missing from the model, or a shape differs; nothing has changed then.
    """
    own = model.state_dict(keep_vars=True)
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise PhregError(
            f"tensors for {described} name {unknown[:3]}, which the model lacks; they belong to another model"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise PhregError(
                f"tensor {name} for {described} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(own[name].shape)}; it belongs to another model or size"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].data = torch.empty_like(own[name]).copy_(tensor)


def first_unpacked(tensors: Iterable[Tensor]) -> Tensor:
    """Finds the first tensor of a type that is computed in; quantised weights are passed over.

    Raises:
        PhregError: There is none.
    """
    found: set[torch.dtype] = set()
    for tensor in tensors:
        if tensor.dtype in COMPUTE_TYPES:
            return tensor
        found.add(tensor.dtype)
    raise PhregError(
        "asked for the type that a model computes in, and found weights of "
        f"{', '.join(map(str, found)) or 'none'} alone; load it with its norms in fp32, fp16 or bf16"
    )


def packed_types(model: nn.Module) -> list[str]:
    """Lists the types of a model's quantised weights, such as `uint8`; empty where none is quantised."""
    types = {parameter.dtype for parameter in model.parameters()} - {*COMPUTE_TYPES}
    return sorted(str(dtype).removeprefix("torch.") for dtype in types)


def matrix_of(layer: nn.Module, like: Tensor) -> Tensor:
    """Reads the (in, out) matrix of a linear layer without a bias: a view of its weight, or unpacked from it.

    Args:
        layer: The layer.
        like: A tensor of the type that the layer computes in.
    """
    weight: Any = layer.weight
    if weight.dtype in COMPUTE_TYPES:
        return weight.T
    return layer(torch.eye(cast(Any, layer).in_features, dtype=like.dtype, device=like.device))


def unit_movers(model: nn.Module) -> list[Any]:
    """Finds each `phreg.sinks.test_time.UnitMover` of a model; one where it has test-time registers."""
    return [vars(module)[UNIT_MOVER] for module in model.modules() if UNIT_MOVER in vars(module)]


def prefixed(module: nn.Module, prefix: str) -> list[str]:
    """Names a module's parameters as seen from its owner: `prefix` + the module's own names."""
    return [f"{prefix}.{name}" for name, _ in module.named_parameters()]
