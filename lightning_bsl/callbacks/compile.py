"""A hint for ``torch.compile`` that the batch size will change."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def expect_other_sizes(batch: Any) -> None:
    """Mark the first dimension of all tensors of a batch as dynamic.

    Otherwise ``torch.compile`` compiles the first batch for its own size, and compiles again at the second size. It is only a
    hint: a graph that cannot be compiled this way is compiled as without it. One batch is enough.

    Args:
        batch: The first batch of a fit.
    """
    apply_to_collection(batch, Tensor, _mark, allow_frozen=True)


def _mark(tensor: Tensor) -> Tensor:
    if tensor.ndim:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor
