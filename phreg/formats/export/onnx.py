"""The ONNX format: dense and pooled features as a graph, for onnxruntime and whatever else reads ONNX.

The graph is `Backbone.forward`, so a dense read-out is in it, and the text tower or a classifier is not. Any
batch size goes; any multiple of the patch too, where the model's way to resample its positions can be
written down, and else its own size alone. Both are tried, in this order, and the first that is equal taken.

    images (batch, 3, height, width) ──model.onnx──► patches (batch, rows, cols, dim), pooled (batch, dim)
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.export import Dim
from torch.onnx.errors import OnnxExporterError

from phreg.backbones.base import Backbone, Features
from phreg.errors import LoadError, PhregError
from phreg.formats.export.spec import Card, Contents, FormatSpec, dense_features

logger = logging.getLogger(__name__)

OPSET = 20
"""Version of ONNX's operators; antialiased resizing came with 18."""

LARGEST = 512
"""Patches a side, at most, of a graph that takes other sizes."""

NEAR = 1e-4
"""Relative difference below which a graph counts as the model while it is being looked for; the export's own
check, which follows, is stricter."""

UNTRACEABLE = (TorchDynamoException, OnnxExporterError, RuntimeError, ValueError, TypeError)
"""What torch raises where a model's path hangs on its input's size, or has no ONNX operator."""


def unsupported_reason(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    others = {str(weight.dtype) for weight in backbone.model.parameters()} - {str(torch.float32)}
    if others:
        found = ", ".join(sorted(others))
        return f"it has weights of {found}, and a graph is written in float32; call model.float() first"
    if backbone.spec.family == "siglip2_vision_model":
        return "it resamples its positions image by image, so that a graph of it is made for one batch size"
    return None


def contents(backbone: Backbone) -> Contents:
    """Writes the graph, free in its image size if that can be, and says what it takes and gives.

    Raises:
        PhregError: torch cannot write the model as a graph that is equal to it.
    """
    own, found = backbone.spec.input_size, []
    for free in (True, False) if backbone.spec.any_size else (False,):
        try:
            program = _graph(backbone, free=free)
            difference = _difference(backbone, program)
        except (*UNTRACEABLE, LoadError) as error:
            found.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        if difference <= NEAR:
            if found:
                logger.warning(
                    "%s as ONNX takes images of %dx%d alone: %s", backbone.describe(), *own, found[0]
                )
            described = {
                "inputs": {"images": ["batch", 3, "height", "width"]},
                "outputs": {"patches": ["batch", "rows", "cols", "dim"], "pooled": ["batch", "dim"]},
                "size": None if free else list(own),  # None: any multiple of the patch
                "patch_size": list(backbone.spec.patch_size),
                "mean": list(backbone.spec.mean),
                "std": list(backbone.spec.std),
                "readout": backbone.readout,
            }
            return Contents({}, {"config.json": described}, {"model.onnx": partial(_save, program)})
        found.append(f"its output differed by {difference:.1e} of the largest value")
    raise PhregError(
        f"asked to export {backbone.describe()} as 'onnx', and torch {torch.__version__} wrote no equal "
        f"graph of it ({'; then, at its own size, '.join(found)}); choose another format"
    )


class Session:
    """A graph in onnxruntime, on the CPU.

    Args:
        file: The graph.

    Attributes:
        any_size: Whether it takes other multiples of the patch than its own size.

    Raises:
        LoadError: It cannot be read.
    """

    def __init__(self, file: Path) -> None:
        from onnxruntime import InferenceSession
        from onnxruntime.capi import onnxruntime_pybind11_state as native  # pyright: ignore

        # They have no base class of their own.
        self._failures = tuple(
            value
            for value in vars(native).values()
            if isinstance(value, type) and issubclass(value, Exception)
        )
        try:
            self._session = InferenceSession(file, providers=["CPUExecutionProvider"])
        except self._failures as error:
            raise LoadError(f"onnxruntime cannot read the graph ({error})") from error
        self.any_size = isinstance(self._session.get_inputs()[0].shape[-1], str)

    def __call__(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Reads features.

        Raises:
            LoadError: The graph cannot be run.
        """
        try:
            outputs: Any = self._session.run(["patches", "pooled"], {"images": images.cpu().numpy()})
        except self._failures as error:
            raise LoadError(f"onnxruntime cannot run the graph ({error})") from error
        patches, pooled = (torch.from_numpy(output).to(images.device) for output in outputs)
        return Features(patches, pooled)


def load(folder: Path) -> Session:
    """Reads such a folder by onnxruntime."""
    return Session(folder / "model.onnx")


class _Read(nn.Module):
    """The model as a function of images alone."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches, pooled = self.backbone(images)
        return patches, pooled


def _graph(backbone: Backbone, *, free: bool) -> Any:
    """Traces a model at a size that is not its own, where others shall work, so that it resamples."""
    (high, wide), (height, width) = backbone.spec.patch_size, backbone.spec.input_size
    dynamic: dict[int, Any] = {0: Dim("batch", min=1)}
    if free:
        height, width = height * 2 + high, width + 3 * wide
        dynamic |= {2: high * Dim("rows", min=2, max=LARGEST), 3: wide * Dim("cols", min=2, max=LARGEST)}
    images = torch.zeros(2, 3, height, width).to(backbone.device)
    with _quietly():
        # A guard that excludes the model's own size becomes an assertion, which the graph leaves out.
        program = torch.export.export(
            _Read(backbone).eval(),
            (images,),
            dynamic_shapes=(dynamic,),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        written: Any = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["patches", "pooled"],
            opset_version=OPSET,
            verbose=False,
        )
    # Stack traces of the export, with paths of this disk, are most of the file.
    for graph in (written.model.graph, *written.model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()
    return written


def _difference(backbone: Backbone, program: Any) -> float:
    """Measures how far a graph is from its model at the model's own size, relative to the largest value."""
    shape = (3, 3, *backbone.spec.input_size)
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(backbone.device)
    with TemporaryDirectory() as folder:
        _save(program, Path(folder) / "model.onnx")
        found = load(Path(folder))(images)
    pairs = zip(found, backbone(images), strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def _save(program: Any, path: Path) -> None:
    with _quietly():
        program.save(path)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps to itself what torch and onnxscript say of their own affairs."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


SPEC = FormatSpec(
    name="onnx",
    unsupported_reason=unsupported_reason,
    contents=contents,
    read_back=load,
    answer=dense_features,
    open=None,
    packages=("onnx", "onnxscript", "onnxruntime"),
    extra="onnx",
    carries_hooks=True,
    leaves=("*.onnx",),
    load_line='onnxruntime.InferenceSession("{folder}/model.onnx")',
    card=Card(
        library="onnxruntime",
        code=(
            'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")  # of {repository}\n'
            "# images: normalised, float32, (batch, 3, height, width)\n"
            'patches, pooled = session.run(["patches", "pooled"], {{"images": images}})'
        ),
        note="The graph ends with the features; a classifier or a text tower is not in it.",
    ),
)
