"""How a result shows itself: one short table, as text in a console and as HTML in a notebook.

    result.short_table() ─► ShortTable ─┬─ repr(result)         aligned columns
                                        └─ result._repr_html_() a table of a notebook

A class gets both by the decorator `shown_as_table`. Tensors and whole settings are not shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar


@dataclass(frozen=True)
class ShortTable:
    """A title, columns and rows of text.

    Attributes:
        title: What is shown.
        rows: The cells, row by row.
        heading: Names of the columns; empty for names and values side by side.
        note: A sentence under the table; empty for none.
    """

    title: str
    rows: Sequence[Sequence[str]]
    heading: Sequence[str] = ()
    note: str = ""

    def __str__(self) -> str:
        lines = [*([self.heading] if self.heading else []), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([self.title, *(f"  {line}" for line in text), *([self.note] if self.note else [])])

    def to_html(self) -> str:
        """Writes the table for a notebook; whatever the cells hold is text there."""

        def line(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

        heading = f"<thead>{line(self.heading, 'th')}</thead>" if self.heading else ""
        rows = "".join(line(row, "td") for row in self.rows)
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return f"<table><caption>{escape(self.title)}</caption>{heading}<tbody>{rows}</tbody></table>{note}"


ShownClass = TypeVar("ShownClass")


def shown_as_table(cls: type[ShownClass]) -> type[ShownClass]:
    """Gives a class with a method `short_table` its `__repr__` and `_repr_html_`."""

    def as_text(self: Any) -> str:
        return str(self.short_table())

    def as_html(self: Any) -> str:
        return self.short_table().to_html()

    # Notebooks look the second one up by its name.
    for name, method in (("__repr__", as_text), ("_repr_html_", as_html)):
        setattr(cls, name, method)
    return cls
