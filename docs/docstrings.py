"""What griffe must know of the docstrings, for the pages of the API."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Object, Parameter, ParameterKind, Parameters


class Docstrings(Extension):
    """Reads ``Example:`` as griffe's ``Examples:``, and the arguments of a ``NamedTuple`` from its fields."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Let an example be code.

        Args:
            obj: What has been read.
        """
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Give a ``NamedTuple`` an ``__init__``.

        Args:
            cls: A class that has been read.
        """
        if any(str(base).endswith("NamedTuple") for base in cls.bases):
            fields = [
                Parameter(name, annotation=field.annotation, kind=ParameterKind.positional_or_keyword, default=field.value)
                for name, field in cls.attributes.items()
                if field.annotation is not None
            ]
            cls.set_member("__init__", Function("__init__", parameters=Parameters(*fields), parent=cls))
