"""Arguments that count something take whole numbers of 1 or more, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_bsl import AdaptiveBatchLRScheduler, BatchSizeDataModule, FullGradientNorm, GradientNoiseScale
from lightning_bsl.callbacks import GradientNormTrigger, NoiseTarget, NormTest, PlateauTrigger
from lightning_bsl.population import Grid
from lightning_bsl.schedules import JointSchedule, plan
from lightning_bsl.theory import BoundConstants, critical_batch_by_branches, growth_to_reach

DATA = partial(BatchSizeDataModule, TensorDataset(torch.zeros(8, 1)))
GRID = partial(Grid, batch_sizes=[8], lrs=[0.1], seeds=1, targets=[1.0])
COUNTS: list[tuple[Callable[..., Any], str]] = [
    (AdaptiveBatchLRScheduler, "check_every"),
    (partial(JointSchedule, 8), "multiple"),
    (FullGradientNorm, "every"),
    (FullGradientNorm, "subset"),
    (FullGradientNorm, "batch_size"),
    (GradientNormTrigger, "subset"),
    (GradientNoiseScale, "every"),
    (GradientNoiseScale, "probe_every"),
    (GradientNoiseScale, "window"),
    (GradientNoiseScale, "probe_size"),
    (NoiseTarget, "round_to"),
    (partial(NormTest, 0.5), "round_to"),
    (partial(PlateauTrigger, "val/loss"), "patience"),
    (DATA, "batch_size"),
    (DATA, "eval_batch_size"),
    (DATA, "samples_per_epoch"),
    (DATA, "max_device_tokens"),
    (GRID, "max_examples"),
    (partial(GRID, max_examples=80), "replicas_per_pass"),
    (partial(plan, JointSchedule(8), 64), "epochs"),
    (partial(plan, JointSchedule(8), epochs=1), "num_examples"),
    (
        partial(critical_batch_by_branches, samples=[1], losses={1: [[1.0], [1.0]], 2: [[1.0], [1.0]]}, tolerance=0.1),
        "batch_size",
    ),
    (partial(growth_to_reach, 0.1, 8, 0.1, 2.0, 1.4, 10, BoundConstants(1.0, 1.0, 1.0)), "num_examples"),
]


@pytest.mark.parametrize("value", [0, 1.5, True, "8"])
@pytest.mark.parametrize(("make", "name"), COUNTS)
def test_what_counts_is_whole(make: Callable[..., Any], name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"`{name}={value!r}` must be \d or more, as a whole number"):
        make(**{name: value})
