"""Writes what was found about a model, and those it is compared with, into a folder.

inspect.json            every figure
report.html             the page
NAME.png                each chart of the page
"""

import json
from pathlib import Path

from phreg.checkpoint import write_text
from phreg.inspection.look import Inspection
from phreg.inspection.page import inspection_page
from phreg.report.html import UNKNOWN, Origin, write_report


def write_inspection(folder: Path, inspection: Inspection, origin: Origin = UNKNOWN) -> None:
    """Writes the folder.

    Args:
        folder: Folder to write; files of these names are replaced.
        inspection: What was found.
        origin: How to make the report again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "inspect.json", json.dumps(inspection.to_json(), indent=2))
    page = inspection_page(inspection, origin)
    write_report(folder / "report.html", page)
    for section in page.sections:
        for chart in section.charts:
            (folder / f"{chart.name}.png").write_bytes(chart.png)
