"""Results show themselves as one short table, in a console and in a notebook."""

from html.parser import HTMLParser

import pytest
import torch

import phreg
from phreg.evaluation.record import Metrics, MetricSpec, summarise
from phreg.evaluation.results import Results
from phreg.record import read_record
from phreg.short_table import ShortTable

QUICK = {
    "steps": 2, "batch_size": 2, "registers": 2, "force": True, "device": "cpu", "data": {"workers": 0},
    "views": {"count": 3}, "measure": {"images": 2, "views": 3, "keep_best": False},
}  # fmt: skip


class Cells(HTMLParser):
    """Reads the cells of a table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.last = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.last = tag
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.last in ("td", "th"):
            self.cells[-1] += data


def record(model, value):
    return summarise(
        [Metrics({"miou": value})], [MetricSpec("miou", about="overlap")], task="segmentation", model=model,
        sha256="0", registers=0, data="voc", settings={}, seeds=(0,), hardware={}, seconds=1.0,
    )  # fmt: skip


def test_columns_are_aligned_and_the_note_stands_below():
    table = ShortTable("a title", [("one", "1"), ("twenty", "20")], ("name", "value"), "a note")
    assert str(table) == "a title\n  name    value\n  one     1\n  twenty  20\na note"


def test_a_table_without_rows_is_its_title():
    assert str(ShortTable("nothing to gain", [])) == "nothing to gain"


def test_whatever_a_cell_holds_is_text_in_a_notebook():
    table = ShortTable("<b>", [("<script>alert(1)</script>", "a & b")], note="<i>")
    found = Cells(table.to_html())
    assert found.cells == ["<script>alert(1)</script>", "a & b"]
    assert not {"b", "i", "script"} & set(found.tags)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of a tiny model, and what it returned."""
    import timm
    from PIL import Image

    folder = tmp_path_factory.mktemp("run")
    (folder / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(8):
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{number}.png")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    return phreg.distill(
        model.eval(), folder / "photos", folder / "out", mean=[0.5] * 3, std=[0.5] * 3, **QUICK
    )


def test_a_run_shows_its_folder_and_its_figures_before_and_after(run):
    lines = repr(run).splitlines()
    assert f"VisionTransformer in {run.run}: 2 steps on 4 images; " in lines[0]
    assert lines[1].split() == ["figure", "before", "after"]
    assert len(lines) == 2 + len(run.comparison.rows())
    assert repr(run.comparison).splitlines()[1:] == lines[1:]
    assert "tensor(" not in repr(run)
    assert Cells(run._repr_html_()).cells[:3] == ["figure", "before", "after"]


def test_records_of_a_model_show_base_registers_and_method(run):
    shown = repr(read_record(run.run / "model" / "phreg.json"))
    rows = dict(line.strip().split(maxsplit=1) for line in shown.splitlines()[1:])
    assert rows["class"] == "VisionTransformer"
    assert rows["registers"] == "2"
    assert len(shown.splitlines()) < 10, "no settings, no versions"
    info = repr(phreg.info(run.run))
    assert info.splitlines()[0] == str(run.run)
    assert "→" in info, "figures before and after"


def test_results_of_an_evaluation_show_a_row_a_model():
    results = Results((record("vit-reg", 0.5),), record("vit", 0.25))
    lines = repr(results).splitlines()
    assert lines[0] == "segmentation on voc"
    assert [line.split() for line in lines[1:4]] == [
        ["model", "miou"],
        ["vit", "(baseline)", "25.00"],
        ["vit-reg", "50.00", "(+25.00)"],
    ]
    assert repr(results.records[0]).splitlines()[-1].split() == ["miou", "50.00", "%"]
