"""A run at four times the batch size: with the constants that follow it is closer to the run at the small one.

The command of docs/results.md: ``pytest -m slow -s -k four_times_the_batch``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from scipy import stats

from harness.fits import fit
from lightning_bsl import BatchLRScheduler
from lightning_bsl.datasets import PydocTopics
from lightning_bsl.models import CausalLM, distilgpt2
from lightning_bsl.schedules import DecayTimescale, HalfLife, SqrtScaling

BASE, LR, EPOCHS, SEEDS = 8, 0.001, 4, 5


class Losses(Callback):
    """The loss of each training step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def losses(seed: int, batch_size: int, follow: Any = None) -> np.ndarray:
    """The training loss over each 128 examples of a run; the same examples for the same seed."""
    seed_everything(seed, verbose=False)
    data = PydocTopics(block_size=64, vocab_size=2048, tokenizer="train", samples_per_epoch=1280, num_workers=0, seed=seed)
    net = distilgpt2(2048, n_positions=64, n_layer=2, n_embd=64, n_head=4, dropout=0.0)
    model = CausalLM(net, partial(torch.optim.AdamW, lr=LR, weight_decay=0.1))
    recorder = Losses()
    scheduler = BatchLRScheduler(batch_size, SqrtScaling(LR, BASE), follow=follow)
    fit(model, data, scheduler, recorder, max_epochs=EPOCHS, limit_val_batches=0)
    return np.array(recorder.values).reshape(-1, 128 // batch_size).mean(axis=1)


@pytest.mark.slow
def test_a_run_at_four_times_the_batch_is_closer_if_the_constants_follow() -> None:
    both = {"betas": HalfLife(BASE), "weight_decay": DecayTimescale(BASE)}
    logs = []
    for seed in range(SEEDS):
        small = losses(seed, BASE)
        rate_alone, following = (np.abs(losses(seed, 4 * BASE, follow) - small).mean() for follow in (None, both))
        logs.append(math.log(following / rate_alone))
        print(f"seed {seed}: mean distance of the curves: rate alone {rate_alone:.4f}, constants follow {following:.4f}")
    mean, half = float(np.mean(logs)), stats.t.ppf(0.975, SEEDS - 1) * stats.sem(logs)
    print(f"ratio {math.exp(mean):.3f} [{math.exp(mean - half):.3f}, {math.exp(mean + half):.3f}]")
    assert mean + half < 0
