"""Checks of single arguments, with one message for each kind of mistake."""

from __future__ import annotations

import math
from numbers import Integral, Real


def check_number(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"`{name}={value!r})` is not a number: write an int or a float")


def check_above_0(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}={value!r}): write a finite number above 0")


def check_whole(name: str, value: object, least: int = 1, instead: str = "", or_none: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number of at least ``least``.

    Args:
        name: Name of the argument.
        value: Its value.
        least: The least value.
        instead: What else the argument may be, such as ``", or None for no limit"``.
        or_none: Whether it may be ``None``.
    """
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"`{name}={value!r}` must be {least} or more, as a whole number{instead}")


def is_length(length: object) -> bool:
    """Whether ``length`` is an ``int`` >= 1 or a ``float`` in (0, 1)."""
    if isinstance(length, Integral) and not isinstance(length, bool):
        return int(length) >= 1
    return isinstance(length, Real) and not isinstance(length, bool) and 0 < float(length) < 1


def check_length(name: str, length: int | float, optional: bool = False) -> None:
    """Raise ``ValueError`` unless ``length`` is an ``int`` >= 1 or a ``float`` in (0, 1).

    Args:
        name: Name of the argument.
        length: Its value.
        optional: Whether the argument may be left out.
    """
    if not is_length(length):
        raise ValueError(
            f"`{name}={length!r}` is not a length: write an int of 1 or more{', or leave it out' if optional else ''} (that "
            "many units), or a float between 0 and 1 (that fraction of the run)"
        )
