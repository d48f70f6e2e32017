"""The README.md beside an adapter: what it is, what it was made from, and what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Base
from phreg.evaluation.retrofit import Row

CITATION = """```bibtex
@inproceedings{chen2025phreg,
  title     = {Vision Transformers with Self-Distilled Registers},
  author    = {Chen, Yinjie and Yan, Zipeng and Zhou, Chong and Dai, Bo and Luo, Andrew F.},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025}
}
@inproceedings{darcet2024registers,
  title     = {Vision Transformers Need Registers},
  author    = {Darcet, Timoth{\\'e}e and Oquab, Maxime and Mairal, Julien and Bojanowski, Piotr},
  booktitle = {International Conference on Learning Representations},
  year      = {2024}
}
```"""


def model_card(backbone: Backbone, base: Base, record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Writes a model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        backbone: The patched model.
        base: What it was made from.
        record: The run's recipe, outcome, read-out and gates, as kept in phreg.json.
        rows: The before/after table; empty where nothing was measured.
    """
    recipe, outcome = record["recipe"], record["outcome"]
    from_hub = base.revision is not None
    front = ["---", "library_name: phreg", "tags: [phreg, registers, vision-transformer]"]
    if from_hub:
        front += [f"base_model: {base.source.removeprefix('hf-hub:')}", "base_model_relation: adapter"]
    lines = [
        *front, "---", "",
        f"# {base.source} with {backbone.num_registers} registers", "",
        f"An adapter for `{base.source}` ({backbone.describe()}"
        + (f", revision `{base.revision}`" if from_hub else "")
        + f"), which adds {backbone.num_registers} register tokens and the weights retrained with them, by "
        "[phreg](https://arxiv.org/abs/2505.21501).", "",
        "```python", "import phreg", "", 'model = phreg.load("path/of/this/folder")', "```", "",
        "## How it was made", "",
        f"Method `{recipe['method']}`, {outcome['steps']} steps of {recipe['batch_size']} images per process "
        f"at {record['size']} pixels; {outcome['trained']:,} weights trained; "
        f"{len(outcome['skipped'])} unreadable images skipped.", "",
        "## Before and after", "",
    ]  # fmt: skip
    if rows:
        lines += ["| figure | before | after |", "| --- | --- | --- |"]
        lines += [f"| {row.name} | {figure(row.before)} | {figure(row.after)} |" for row in rows]
        apart = "not trained on" if record["figures"]["held_out"] else "that were trained on too"
        lines += ["", f"On {record['figures']['images']} images {apart}."]
    else:
        lines += ["Not measured."]
    if record["gates"]["failures"]:
        lines += ["", f"**Failed its gates:** {'; '.join(record['gates']['failures'])}."]
    if record["readout"] != "plain":
        lines += [
            "",
            f"Its dense features are meant to be read through the last block's {record['readout']} read-out; "
            "the model's ordinary pooled output was not trained, and the table says how far it drifted.",
        ]
    return "\n".join([*lines, "", "## Citation", "", CITATION, ""])


def figure(value: float | None) -> str:
    """Writes a figure with four digits after the point; a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"
