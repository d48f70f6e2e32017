"""The folder that `phreg inspect` leaves behind."""

import json
from pathlib import Path

from looking import looked_at, sinking_model
from PIL import Image

from phreg.report.figures import figures
from phreg.report.folder import HEAD_SIDE, write_inspection
from phreg.report.html import Origin, read_pictures


def test_a_folder_holds_the_figures_the_page_and_each_of_its_charts(tmp_path: Path):
    backbone, images = sinking_model()
    found = looked_at(backbone, "sinking", images, show=1)
    folder = tmp_path / "deep" / "out"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("of an earlier look")
    write_inspection(folder, found, Origin("phreg inspect sinking"))
    charts = {f"{chart.name}.png": chart.alt for chart in figures(found.models)}
    assert {path.name for path in folder.iterdir()} == {
        "inspect.json",
        "report.html",
        "heads-01.png",
        *charts,
    }
    heads, rows, cols = found.survey.shown[0].attention.shape[1:]
    with Image.open(folder / "heads-01.png") as sheet:
        side = HEAD_SIDE // max(rows, cols) * max(rows, cols)  # whole pixels a patch, as many as needed
        assert sheet.width >= (1 + heads) * side, "the mean and every head"
        assert sheet.height < 2 * sheet.width / (1 + heads), "one row, for CLS"
    assert json.loads((folder / "inspect.json").read_text()) == json.loads(json.dumps(found.to_json()))
    shown = dict(read_pictures(folder / "report.html"))
    for name, alt in charts.items():
        assert (folder / name).read_bytes() == shown[alt]
    assert "phreg inspect sinking" in (folder / "report.html").read_text()
