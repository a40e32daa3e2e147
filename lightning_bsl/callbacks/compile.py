"""What ``torch.compile`` is told of a batch size that changes."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def expect_other_sizes(batch: Any) -> None:
    """Have whatever is compiled for this batch compiled for batches of other sizes too.

    Else the first batch is compiled for its own size, and the second, of another size, for all of them. A hint: what
    cannot be compiled so is compiled as without it. One batch is enough, as ``torch.compile`` remembers.
    """
    apply_to_collection(batch, Tensor, _mark, allow_frozen=True)


def _mark(tensor: Tensor) -> Tensor:
    if tensor.ndim:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor
