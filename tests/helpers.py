from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeVar

T = TypeVar("T")


def flat(lists: Iterable[Iterable[T]]) -> list[T]:
    return list(chain.from_iterable(lists))


def quiet(**arguments: Any) -> dict[str, Any]:
    """Arguments of a Trainer that leaves no files and prints nothing, unless told."""
    silent = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
    return dict.fromkeys(silent, False) | {"accelerator": "cpu", "num_sanity_val_steps": 0} | arguments
