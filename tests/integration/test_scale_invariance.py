"""A run at four times the batch size: if the constants follow, it is closer to the run at the small one.

The command of docs/results.md: ``pytest -m slow -s -k four_times_the_batch``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from scipy import stats

from harness.fits import fit
from lightning_bsl import BatchLRScheduler
from lightning_bsl.datasets import PydocTopics
from lightning_bsl.models import CausalLM, distilgpt2
from lightning_bsl.schedules import DecayTimescale, HalfLife, SqrtScaling

BASE, LR, EPOCHS, SEEDS = 2, 0.0005, 2, 10
FOLLOW: dict[str, dict[str, Any]] = {
    "rate alone": {},
    "betas": {"betas": HalfLife(BASE)},
    "betas and weight decay": {"betas": HalfLife(BASE), "weight_decay": DecayTimescale(BASE)},
}


class Losses(Callback):
    """The loss of the validation set, after each 128 samples."""

    def __init__(self, scheduler: BatchLRScheduler) -> None:
        self.scheduler = scheduler
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.scheduler.progress.samples % 128:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batch = data.on_after_batch_transfer(data.val_set.__getitems__(list(range(len(data.val_set)))), 0)
        pl_module.eval()
        with torch.no_grad():
            self.values.append(float(pl_module.full_loss(batch)))  # type: ignore[operator]
        pl_module.train()


def losses(seed: int, batch_size: int, **follow: Any) -> np.ndarray:
    """The curve of a run; the same examples in the same order for the same seed."""
    seed_everything(seed, verbose=False)
    data = PydocTopics(block_size=64, vocab_size=2048, tokenizer="train", samples_per_epoch=1280, num_workers=0, seed=seed)
    net = distilgpt2(2048, n_positions=64, n_layer=2, n_embd=64, n_head=4, dropout=0.0)
    model = CausalLM(net, partial(torch.optim.AdamW, lr=LR, weight_decay=0.1))
    scheduler = BatchLRScheduler(batch_size, SqrtScaling(LR, BASE), follow=follow)
    recorder = Losses(scheduler)
    fit(model, data, scheduler, recorder, max_epochs=EPOCHS, limit_val_batches=0)
    return np.array(recorder.values)


@pytest.mark.slow
def test_a_run_at_four_times_the_batch_is_closer_if_the_constants_follow() -> None:
    distances: dict[str, list[float]] = {name: [] for name in FOLLOW}
    for seed in range(SEEDS):
        small = losses(seed, BASE)
        assert len(small) == EPOCHS * 10
        for name, follow in FOLLOW.items():
            distances[name].append(float(np.abs(losses(seed, 4 * BASE, **follow) - small).mean()))
        print(f"seed {seed}: mean distance of the curves:", {name: round(each[-1], 4) for name, each in distances.items()})
    upper = {}
    for name in list(FOLLOW)[1:]:
        logs = np.log(distances[name]) - np.log(distances["rate alone"])
        mean, half = float(np.mean(logs)), float(stats.t.ppf(0.975, SEEDS - 1) * stats.sem(logs))
        upper[name] = math.exp(mean + half)
        print(f"{name} over rate alone: {math.exp(mean):.3f} [{math.exp(mean - half):.3f}, {upper[name]:.3f}]")
    assert upper["betas and weight decay"] < 1
