"""Templates, and how they show numbers and figures. A page is one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lightning_bsl.theory import LEVEL, Estimate

NONE = "\u2013"  # a dash where there is no number


class Figure(NamedTuple):
    """A figure that was drawn: its PNG file, what it shows against what, and both in words."""

    file: Path
    metric: str
    axis: str
    title: str


def number(value: float) -> str:
    """A number as a reader wants it.

    Example:
        >>> number(12345.6), number(0.123456), number(float("nan"))
        ('12,346', '0.1235', '–')
    """
    if not math.isfinite(value):
        return NONE if math.isnan(value) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.4g}"


def interval(of: Estimate) -> str:
    """An estimate with its interval.

    Example:
        >>> interval(Estimate(412.0, 20.0, 350.0, 480.0))
        '412 [350; 480]'
    """
    value, low, high = (number(float(f"{end:.3g}")) for end in (of.value, of.low, of.high))
    return f"{value} [{low}; {high}]"


def render(template: str, **values: object) -> str:
    """A template, its file without ``.j2``, filled in; what is written into HTML is escaped."""
    return _TEMPLATES.get_template(f"{template}.j2").render(values)


def _breaks(name: str) -> Markup:
    """A name that may go on in the next line after some of its characters."""
    return Markup(re.sub(r"([_=/,]\s*)", r"\1<wbr>", str(escape(name))))


_TEMPLATES = Environment(
    loader=PackageLoader("lightning_bsl.report"),
    autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals |= {"level": f"{LEVEL:.0%}", "nan": math.nan, "inf": math.inf}
_TEMPLATES.filters |= {"number": number, "interval": interval, "breaks": _breaks}
_TEMPLATES.filters["base64"] = lambda file: base64.b64encode(file.read_bytes()).decode()
