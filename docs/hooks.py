"""What mkdocs does not do by itself: fills generated tables into pages, and takes in files from beside docs/.

<!-- settings --> ──► a table of every setting
![…](../benchmarks/….png) ──► the picture, copied into the site
[text](../path) ──► text (`path`), as a site holds no files of the repository
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File
from pydantic import BaseModel

from phreg.cli.flags import default_text
from phreg.config import DistillConfig
from phreg.methods import METHODS

ROOT = Path(__file__).parents[1]
PICTURE = re.compile(r"(!\[[^\]]*\])\(\.\./([^)]*\.png)\)")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./([^)#]*)[^)]*\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pictures that pages show from elsewhere in the repository."""
    shown = {path for page in files.documentation_pages() for _, path in PICTURE.findall(page.content_string)}
    for path in sorted(shown):
        picture = File.generated(
            config, f"pictures/{PurePosixPath(path).name}", abs_src_path=str(ROOT / path)
        )
        files.append(picture)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in what is generated, and changes references to files outside of docs/."""
    for marker, make in GENERATED.items():
        markdown = markdown.replace(marker, make())
    markdown = PICTURE.sub(lambda found: f"{found[1]}(pictures/{PurePosixPath(found[2]).name})", markdown)
    return LINK.sub(r"\1 (`\2`)", markdown)


def settings(section: type[BaseModel] = DistillConfig, prefix: str = "") -> str:
    """Lists every setting of a section and those inside: tables with the defaults of all methods."""
    rows, inner = [], []
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append(settings(kind, f"{prefix}{name}."))
            continue
        default = default_text(prefix + name, field.default).strip("()").removeprefix("default: ")
        rows.append(f"| `{prefix}{name}` | {cell(default) or '-'} | {cell(str(field.description))} |")
    about = " ".join((section.__doc__ or "").split())
    head = [
        f"## {prefix.rstrip('.') or 'The run'}",
        "",
        about,
        "",
        "| setting | default | meaning |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows, "", *inner])


def methods() -> str:
    """Lists the methods, a line each."""
    rows = [f"| `{method.name}` | {cell(method.summary)} |" for method in METHODS.values()]
    return "\n".join(["| `--method` | what it does |", "|---|---|", *rows])


def cell(text: str) -> str:
    """Puts a text into one line, and escapes what would end a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


GENERATED = {"<!-- settings -->": settings, "<!-- methods -->": methods}
"""What stands for what in a page."""
