"""The Hugging Face libraries, which are an extra, and their hub, which may be out of reach."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal


def text_library(name: str) -> Any:
    """Import a library of the ``text`` extra.

    Args:
        name: The module.

    Raises:
        ModuleNotFoundError: It is not installed; the message names the extra.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"language models need {error.name}, which is not installed: pip install 'lightning_bsl[text]'", name=error.name
        ) from error


def check_reachable(name: str, kind: Literal["model", "dataset"], remedy: str, revision: str | None = None) -> None:
    """Ask the hub for a repository, once: its own downloads retry for half a minute before they give up.

    Args:
        name: The repository.
        kind: What it holds.
        remedy: What to do where it cannot be reached, for the message.
        revision: Its branch.

    Raises:
        ConnectionError: No answer, or none that says the repository is there.
    """
    hub = text_library("huggingface_hub")
    try:
        hub.HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10)
    except Exception as error:  # the hub's and its HTTP library's errors have no base in common, and other ones in each version
        raise ConnectionError(f"{name} cannot be reached on huggingface.co ({error}). {remedy}") from error
