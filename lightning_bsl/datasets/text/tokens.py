"""Data sets of tokens: blocks of one length, and whole documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset


class TokenBlocks(Dataset[Tensor]):
    """A row of tokens, cut into blocks of one length; one gather makes a whole batch.

    The tokens behind the last whole block, fewer than one block, are in ``remainder`` and in no block.

    Args:
        tokens: Integers ``[n]``, in memory or mapped from a file.
        block_size: Tokens of a block.

    Raises:
        ValueError: Fewer tokens than one block, or blocks of fewer than 2: there would be nothing to predict.

    Example:
        >>> data = TokenBlocks(np.arange(11), block_size=4)
        >>> len(data), data.__getitems__([1, 0]).tolist(), data.remainder.tolist()
        (2, [[4, 5, 6, 7], [0, 1, 2, 3]], [8, 9, 10])
    """

    takes_tensors: ClassVar[bool] = True  # of indices: a list of them costs more than the gather
    path: Path | None = None  # of the file that holds these tokens and no others

    def __init__(self, tokens: npt.NDArray[Any], block_size: int) -> None:
        check_block_size(block_size)
        if len(tokens) < block_size:
            raise ValueError(f"{len(tokens)} tokens do not fill one block of {block_size}; write a smaller `block_size`")
        self.tokens = tokens
        self.block_size = block_size
        self.blocks = tokens[: len(self) * block_size].reshape(-1, block_size)

    @property
    def remainder(self) -> npt.NDArray[Any]:
        """The tokens behind the last whole block."""
        return self.tokens[len(self) * self.block_size :]

    def __len__(self) -> int:
        return len(self.tokens) // self.block_size

    def __getitem__(self, index: int) -> Tensor:
        """Return a block, int64 ``[block_size]``."""
        return torch.from_numpy(self.blocks[index].astype(np.int64))

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return blocks, int64 ``[B, block_size]``."""
        return torch.from_numpy(self.blocks[np.asarray(indices)].astype(np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        """Send a worker the file's name, not what is in it."""
        if self.path is not None:
            return open_blocks, (self.path, self.tokens.dtype.str, self.block_size)
        return type(self), (np.asarray(self.tokens), self.block_size)


def open_blocks(path: Path, dtype: str, block_size: int) -> TokenBlocks:
    """Map the blocks of a file of tokens into memory."""
    blocks = TokenBlocks(np.memmap(path, dtype, mode="r"), block_size)
    blocks.path = path
    return blocks


def identity(batch: Tensor) -> Tensor:
    """Collate nothing: ``TokenBlocks`` returns whole batches."""
    return batch


class TokenDocuments(Dataset[Tensor]):
    """Documents in a row of tokens, each an example by itself; a long one is cut into parts.

    Every part but a document's last has ``block_size`` tokens. A part of a single token is no example: nothing of it could
    be predicted.

    Args:
        tokens: Integers ``[n]``, in memory or mapped from a file.
        ends: Where each document ends, in their order ``[documents]``: the index behind its last token.
        block_size: Most tokens of an example.

    Attributes:
        lengths: Tokens of each example, int64 ``[examples]``.

    Raises:
        ValueError: ``block_size`` is below 2, or no document has 2 tokens.

    Example:
        >>> data = TokenDocuments(np.arange(11), ends=np.array([3, 4, 11]), block_size=4)
        >>> [example.tolist() for example in data], data.lengths.tolist()
        ([[0, 1, 2], [4, 5, 6, 7], [8, 9, 10]], [3, 4, 3])
        >>> pad(data.__getitems__([0, 1]))["attention_mask"].tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1]]
    """

    takes_tensors: ClassVar[bool] = True  # of indices
    path: Path | None = None  # of the file that holds these tokens and no others, beside that of the ends

    def __init__(self, tokens: npt.NDArray[Any], ends: npt.NDArray[np.int64], block_size: int) -> None:
        check_block_size(block_size)
        self.tokens, self.ends, self.block_size = tokens, ends, block_size
        self._row, ends = np.asarray(tokens), np.asarray(ends)  # slices of a memmap are slow
        first = np.concatenate([[0], ends[:-1]])
        parts = -(-(ends - first) // block_size)  # of each document
        part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)  # its number within its document
        starts = np.repeat(first, parts) + part * block_size
        lengths = np.minimum(np.repeat(ends, parts) - starts, block_size)
        self._starts, self.lengths = starts[lengths > 1], lengths[lengths > 1]
        if not len(self):
            raise ValueError(f"none of the {len(ends):,} documents has 2 tokens: there is nothing to predict; give more text")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        """Return an example, int64 ``[length]``."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> list[Tensor]:
        """Return examples, each int64 ``[length]``."""
        chosen = np.asarray(indices, dtype=np.int64)
        places = zip(self._starts[chosen].tolist(), self.lengths[chosen].tolist())
        return [torch.from_numpy(self._row[start : start + length].astype(np.int64)) for start, length in places]

    def __reduce__(self) -> tuple[Any, ...]:
        """Send a worker the files' name, not what is in them."""
        if self.path is not None:
            return open_documents, (self.path, self.tokens.dtype.str, self.block_size)
        return type(self), (np.asarray(self.tokens), np.asarray(self.ends), self.block_size)


def open_documents(path: Path, dtype: str, block_size: int) -> TokenDocuments:
    """Map the documents of a file of tokens into memory, their ends from the file beside it."""
    ends = np.memmap(ends_of(path), np.int64, mode="r")
    documents = TokenDocuments(np.memmap(path, dtype, mode="r"), ends, block_size)
    documents.path = path
    return documents


def ends_of(path: Path) -> Path:
    """The file with the ends of the documents in a file of tokens."""
    return path.with_name(f"{path.stem}_ends.bin")


def pad(examples: list[Tensor]) -> dict[str, Tensor]:
    """Collate examples of several lengths, with padding at the right.

    Args:
        examples: Tokens, each ``[length]``.

    Returns:
        ``input_ids`` and ``attention_mask``, 0 for padding: int64 ``[examples, longest]``.
    """
    if not examples:  # a process's share of a step may be empty
        return dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(0, 0, dtype=torch.int64))
    tokens = pad_sequence(examples, batch_first=True)
    lengths = torch.tensor([len(example) for example in examples])
    return {"input_ids": tokens, "attention_mask": (torch.arange(tokens.shape[1]) < lengths[:, None]).long()}


def check_block_size(block_size: int) -> None:
    """Refuse blocks of fewer than 2 tokens.

    Raises:
        ValueError: There would be nothing to predict.
    """
    if block_size < 2:
        raise ValueError(f"`block_size={block_size}` must be 2 or more: a token is predicted from those before it")
