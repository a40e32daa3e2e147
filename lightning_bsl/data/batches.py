"""Nested batches: the number of their examples, their parts, and batches one after the other."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = (bool, int, float, str, bytes, type(None))
NESTED = (Tensor, np.ndarray, Mapping, list, tuple)
REMEDY = "give a stream of single examples, and `collate` to make batches of them"
WHOLE_REMEDY = "let the loader give tensors whose first dimension are the examples, or an object whose `len` is their number"


def is_node(tree: Any, nested: tuple[type, ...] = NESTED) -> bool:
    """Whether a part of a batch has fields: it is a dict, or a list or tuple that has not one plain value for each example.

    Args:
        tree: The batch, or a part of it.
        nested: What is no plain value.
    """
    if isinstance(tree, (list, tuple)):
        return not tree or any(isinstance(part, nested) for part in tree)
    return isinstance(tree, Mapping)


def mapped(function: Callable[..., Any], *trees: Any, nested: tuple[type, ...] = NESTED) -> Any:
    """Apply a function to the leaves of batches that are alike.

    Args:
        function: Called with the same leaf of each batch.
        trees: The batches, or the same part of each of them.
        nested: The same as for ``is_node``.

    Raises:
        ValueError: The batches have other fields.
    """
    first = trees[0]
    if not is_node(first, nested):
        return function(*trees)
    if isinstance(first, Mapping):
        if any(not isinstance(tree, Mapping) or tree.keys() != first.keys() for tree in trees):
            raise _unlike(f"{list(tree)}" if isinstance(tree, Mapping) else type(tree).__name__ for tree in trees)
        fields = {key: mapped(function, *(tree[key] for tree in trees), nested=nested) for key in first}
        return fields if type(first) is dict else type(first)(fields)  # type: ignore[call-arg]
    if any(type(tree) is not type(first) or len(tree) != len(first) for tree in trees):
        raise _unlike(type(tree).__name__ for tree in trees)
    values = [mapped(function, *parts, nested=nested) for parts in zip(*trees)]
    return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)


def sliced(tree: Any, start: int, stop: int) -> Any:
    """A part of a batch.

    Args:
        tree: The batch.
        start: The first example.
        stop: The first example after them.
    """
    return mapped(lambda leaf: None if leaf is None else leaf[start:stop], tree)


def joined(trees: list[Any]) -> Any:
    """Batches one after the other.

    Args:
        trees: The batches.

    Raises:
        ValueError: They are not alike.
    """
    return mapped(_joined, *trees)


def _joined(*leaves: Any) -> Any:
    first = leaves[0]
    if isinstance(first, (Tensor, np.ndarray)):
        try:
            return torch.cat(leaves) if isinstance(first, Tensor) else np.concatenate(leaves)
        except (RuntimeError, TypeError, ValueError) as error:
            kinds = (f"{tuple(leaf.shape)}" if isinstance(leaf, type(first)) else type(leaf).__name__ for leaf in leaves)
            raise _unlike(kinds) from error
    if isinstance(first, (list, tuple)):
        return type(first)(value for leaf in leaves for value in leaf)
    if any(leaf is not None for leaf in leaves):
        raise _unlike(type(leaf).__name__ for leaf in leaves)
    return None


def _unlike(kinds: Iterator[str]) -> ValueError:
    kinds = iter(dict.fromkeys(kinds))
    return ValueError(f"batches of the stream cannot be joined, since they are not alike ({', '.join(kinds)}); {REMEDY}")


def size_of(batch: Any, batch_size: int | None = None) -> int:
    """Number of examples of a batch that can be divided.

    Args:
        batch: The batch.
        batch_size: The batch size of the loader, if it is known. A list of so many examples looks like the fields of a batch.

    Raises:
        ValueError: The parts of the batch do not have one row for each example.
    """
    sizes = dict(_sizes(batch, "batch"))
    if len(set(sizes.values())) != 1:
        parts = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise ValueError(
            "a batch of the stream cannot be divided, since its parts do not have one row for each example "
            f"({parts or 'no tensors'}); {REMEDY}"
        )
    size = next(iter(sizes.values()))
    if batch_size and (size > batch_size or (isinstance(batch, list) and len(batch) == batch_size != size)):
        raise ValueError(
            f"the loader has batch_size={batch_size}, but its batches have parts with {size} rows each: the first dimension "
            f"must be the examples; {REMEDY}"
        )
    return size


def size_of_whole(batch: Any, batch_size: int | None = None) -> int:
    """Number of examples of a batch that stays whole, so that it may be an object of any kind, such as a batch of graphs.

    Args:
        batch: The batch.
        batch_size: The batch size of the loader, if it is known.

    Raises:
        ValueError: The number is not known.
    """
    if not isinstance(batch, (*NESTED, *PLAIN)) and hasattr(batch, "__len__"):
        return len(batch)
    try:
        return size_of(batch, batch_size)
    except ValueError as error:
        reason = str(error).removesuffix(f"; {REMEDY}").replace(" cannot be divided", " has no known number of examples")
        raise ValueError(f"{reason}; {WHOLE_REMEDY}") from None


def _sizes(tree: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(tree, (Tensor, np.ndarray)):
        yield path, len(tree) if tree.ndim else 0
    elif is_node(tree):
        if tree and isinstance(tree, (list, tuple)) and all(isinstance(part, list) and not is_node(part) for part in tree):
            raise ValueError(
                f"a batch of the stream cannot be divided: it is not known whether {path}, a list of lists, holds fields "
                f"or examples; {REMEDY}"
            )
        for key, part in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _sizes(part, f"{path}[{key!r}]")
    elif isinstance(tree, (list, tuple)):
        yield path, len(tree)
    elif tree is not None:
        raise ValueError(
            f"a batch of the stream cannot be divided: {path} is a {type(tree).__name__}, but must be a tensor, an array or a "
            "list with one entry for each example"
        )


def pinned(batch: Any) -> Any:
    """A batch in pinned memory, which can be copied to a GPU while that computes.

    Args:
        batch: The batch; an object that is no tensor must have a method ``pin_memory``, or stays as it is.
    """

    def pin(leaf: Any) -> Any:
        on_device = isinstance(leaf, Tensor) and (leaf.device.type != "cpu" or leaf.layout != torch.strided)
        return leaf.pin_memory() if hasattr(leaf, "pin_memory") and not on_device else leaf

    return mapped(pin, batch)


def leaves(tree: Any) -> Iterator[Any]:
    """All that a batch or an example holds.

    Args:
        tree: The batch or example.
    """
    if isinstance(tree, (Mapping, list, tuple)):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from leaves(part)
    else:
        yield tree


def checksum(tree: Any) -> int:
    """A number that tells examples apart, of a few values of each of their parts.

    Args:
        tree: The example, or a batch.
    """
    total = 0
    for leaf in leaves(tree):
        if isinstance(leaf, (Tensor, np.ndarray)):
            values = (leaf.detach() if isinstance(leaf, Tensor) else leaf).reshape(-1)
            total = zlib.crc32(repr(values[:: len(values) // 16 + 1].tolist()).encode(), total)
        elif isinstance(leaf, PLAIN):
            total = zlib.crc32(leaf[:4096] if isinstance(leaf, bytes) else repr(leaf)[:4096].encode(), total)
    return total
