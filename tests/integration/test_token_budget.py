"""A language model that trains for a number of tokens, with growth, rate, validations and checkpoints on one clock."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from harness.fits import fit
from harness.modules import equal
from lightning_bsl import BatchLRScheduler, CheckpointEvery, ValidateEvery
from lightning_bsl.datasets import PydocTopics
from lightning_bsl.models import CausalLM, distilgpt2
from lightning_bsl.schedules import Cosine, Milestones

TOKENS, BLOCK, EVERY, EPOCH = 100_000, 64, 20_000, 480


class Journal(Callback):
    """The tokens before each step with its size and rate, and the tokens at each validation."""

    def __init__(self, scheduler: BatchLRScheduler) -> None:
        self.scheduler = scheduler
        self.steps: list[tuple[int, int, float]] = []
        self.validated: list[int] = []

    @property
    def tokens(self) -> int:
        return self.scheduler.progress.count("tokens")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.steps.append((self.tokens, len(batch), trainer.optimizers[0].param_groups[0]["lr"]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated.append(self.tokens)


def run(folder: Path, path: Path | None = None) -> tuple[CausalLM, Journal]:
    seed_everything(3, verbose=False)
    data = PydocTopics(block_size=BLOCK, vocab_size=512, tokenizer="train", samples_per_epoch=EPOCH, num_workers=0)
    net = distilgpt2(512, n_positions=BLOCK, n_layer=1, n_embd=16, n_head=2, dropout=0.1)
    model = CausalLM(net, partial(torch.optim.AdamW, lr=0.002))
    ramp = Milestones([8, 16, 32], at=[EVERY, 3 * EVERY], unit="tokens")
    scheduler = BatchLRScheduler(ramp, Cosine(0.002, unit="tokens"), max_tokens=TOKENS)
    journal = Journal(scheduler)
    saves = CheckpointEvery(EVERY, "tokens", dirpath=folder, filename="{tokens}")
    validates = ValidateEvery(EVERY, "tokens")
    fit(model, data, scheduler, validates, journal, saves, max_epochs=-1, limit_val_batches=1, ckpt_path=path,
        enable_checkpointing=True)  # fmt: skip
    return model, journal


def test_a_run_to_a_number_of_tokens(tmp_path: Path) -> None:
    model, journal = run(tmp_path / "whole")
    *_, (before, size, rate) = journal.steps
    assert before < TOKENS <= journal.tokens == -(-TOKENS // BLOCK) * BLOCK == before + size * BLOCK
    length = journal.tokens
    for tokens, number, lr in journal.steps:
        scheduled = 8 if tokens < EVERY else 16 if tokens < 3 * EVERY else 32
        left = EPOCH - tokens // BLOCK % EPOCH
        assert number == min(scheduled, left) or tokens == before
        assert lr == pytest.approx(0.001 * (1 + math.cos(math.pi * tokens / length)))
    assert rate < 0.0001
    ends = [tokens + number * BLOCK for tokens, number, _ in journal.steps]
    marks = [next(end for end in ends if end >= EVERY * k) for k in range(1, 6)]
    assert journal.validated == marks
    for saved in marks[1:3]:  # in the middle, and where the validation of the step is still to come
        resumed, rest = run(tmp_path / "resumed", tmp_path / "whole" / f"tokens={saved}.ckpt")
        assert equal(resumed, model)
        assert rest.steps == [step for step in journal.steps if step[0] >= saved]
        assert rest.validated == [mark for mark in marks if mark >= saved]
