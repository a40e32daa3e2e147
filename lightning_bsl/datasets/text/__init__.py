"""Data sets of text."""

from lightning_bsl.datasets.text.datamodule import TextDataModule
from lightning_bsl.datasets.text.eli5 import ELI5Category
from lightning_bsl.datasets.text.folder import TextFolder
from lightning_bsl.datasets.text.pydoc import PydocTopics
from lightning_bsl.datasets.text.tokenizer import END_OF_TEXT, read_tokenizer, train_tokenizer
from lightning_bsl.datasets.text.tokens import TokenBlocks, TokenDocuments, identity, pad

__all__ = [
    "END_OF_TEXT",
    "ELI5Category",
    "PydocTopics",
    "TextDataModule",
    "TextFolder",
    "TokenBlocks",
    "TokenDocuments",
    "identity",
    "pad",
    "read_tokenizer",
    "train_tokenizer",
]
