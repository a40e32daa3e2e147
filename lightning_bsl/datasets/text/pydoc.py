"""The documentation of Python as a small text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_bsl.datasets.text.datamodule import Document, TextDataModule


class PydocTopics(TextDataModule):
    """The English documentation of the language that comes with every CPython: 0.4 MB of text without a download.

    A document is one of pydoc's topics. Some repeat parts of others: a paragraph counts where it comes first, so that
    none is in training and validation both.

    Args:
        **options: As of ``TextDataModule``; ``tokenizer`` is ``"train"`` by default, with 2048 tokens.

    Raises:
        ModuleNotFoundError: When loading: this Python came without its documentation.

    Example:
        >>> PydocTopics(block_size=64).vocab_size
        2048
    """

    def __init__(self, root: str | Path | None = None, **options: Any) -> None:
        defaults: dict[str, Any] = {"tokenizer": "train", "vocab_size": 2048}
        super().__init__(root, **defaults | options)

    def fingerprint(self) -> object:
        """A digest of the text, which differs between versions of Python."""
        return hashlib.sha256("\0".join(text for _, text in self.documents()).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Yield the topics."""
        try:
            from pydoc_data.topics import topics
        except ModuleNotFoundError as error:  # as of Debian's python3-minimal
            raise ModuleNotFoundError(
                "this Python has no `pydoc_data`, the documentation of the language: install the rest of Python (on Debian "
                "and Ubuntu `apt install libpython3-stdlib`), or take another data set (data=text data.root=DIR)",
                name=error.name,
            ) from error
        seen: set[str] = set()
        for text in topics.values():
            paragraphs = text.split("\n\n")
            new = [paragraph for paragraph in paragraphs if paragraph.strip() not in seen]
            seen.update(paragraph.strip() for paragraph in paragraphs)
            yield "train", "\n\n".join(new)
