"""A page as one HTML file that needs nothing else: its tables and its figures."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import NamedTuple

NONE = "\u2013"  # a dash where there is no number
_CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # nothing is ever fetched


class Cell(NamedTuple):
    """What a cell shows, as HTML, and by what number it is sorted, if not by its text."""

    html: str
    key: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        title: Above it.
        head: Of its columns; the first names the row.
        rows: The cells.
        note: Below the title, as HTML.
    """

    title: str
    head: list[str]
    rows: list[list[Cell]]
    note: str = ""


def page_html(title: str, notes: Iterable[str], body: str) -> str:
    """The whole page.

    Args:
        title: Of the page.
        notes: What to know before reading on, as HTML.
        body: The rest, as HTML.

    Example:
        >>> page_html("Runs", [], "<p>none</p>").splitlines()[0]
        '<!DOCTYPE html>'
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_CSP}">
<title>{escape(title)}</title>
<style>{_part("page.css")}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{"".join(f'<p class="warn">{note}</p>' for note in notes)}
{body}
<script>{_part("page.js")}</script>
</body>
</html>
"""


def table_html(table: Table) -> str:
    """A table, which the page's script sorts by a click on a header."""
    # a column is text where no cell has a number to sort by; its header stands where its cells do
    texts = [all(row[column].key is None for row in table.rows) for column in range(len(table.head))]
    mark = [' class="text"' if text else "" for text in texts]
    head = "".join(f'<th scope="col"{css}>{escape(title)}</th>' for title, css in zip(table.head, mark))
    body = "".join("<tr>" + "".join(map(_cell, row, mark)) + "</tr>\n" for row in table.rows)
    note = f'<p class="note">{table.note}</p>' if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2>\n{note}\n<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def image_html(file: Path, title: str) -> str:
    """A PNG file, inside of the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}"></figure>\n'


def estimate_cell(value: float, low: float, high: float, before: str = "") -> Cell:
    """A number and, unless it is nan, its interval."""
    interval = "" if math.isnan(low) else f" <small>[{number(low)}; {number(high)}]</small>"
    return Cell(f"{before}{number(value)}{interval}", value)


def number(value: float) -> str:
    """A number as a reader wants it.

    Example:
        >>> number(12345.6), number(0.123456), number(float("nan"))
        ('12,346', '0.1235', '–')
    """
    if not math.isfinite(value):
        return NONE if math.isnan(value) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.4g}"


def csv_values(line: Sequence[object]) -> list[object]:
    """The values of a line of a CSV file: nothing where there is no number."""
    return ["" if isinstance(value, float) and math.isnan(value) else value for value in line]


def _part(name: str) -> str:
    return "\n" + resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _cell(cell: Cell, css: str) -> str:
    key = "" if cell.key is None or math.isnan(cell.key) else f' data-key="{cell.key!r}"'
    return f"<td{css}{key}>{cell.html}</td>"
