"""Train a language model on padded sentences in micro-batches, and see what `loss_terms` is for.

The loss is a mean over the tokens that are not padding. Micro-batches of one step hold different numbers of those, so the mean
of their means is not the mean over the step. A method `loss_terms(batch)` says how many there are; the gradient is then that of
the whole step, whatever its micro-batches are. Without it a warning says so.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_bsl import BatchLRScheduler
from lightning_bsl.schedules import Exponential

PADDING = 0


class Sentences(Dataset[Tensor]):
    """Each counts upwards from a random number, 2 to 24 tokens."""

    def __init__(self, number: int) -> None:
        draw = random.Random(0)
        starts = [(draw.randrange(1, 20), draw.randrange(2, 25)) for _ in range(number)]
        self.tokens = [torch.arange(start, start + length) for start, length in starts]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]


def pad(examples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Put sentences of several lengths into one batch ``[batch, longest]``."""
    tokens = nn.utils.rnn.pad_sequence(list(examples), batch_first=True, padding_value=PADDING)
    return {"tokens": tokens, "labels": tokens.masked_fill(tokens == PADDING, -100)}


class LanguageModel(LightningModule):
    """Predicts the next token; its loss is a mean over the tokens that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.memory = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 50)
        self.first_norm = 0.0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean over the tokens that are predicted."""
        logits = self.head(self.memory(self.embedding(batch["tokens"]))[0])
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Note the norm of the first step's gradient."""
        if self.global_step == 0:
            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            self.first_norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()

    def configure_optimizers(self) -> Any:
        """AdamW; the learning rate is left to the callback."""
        return torch.optim.AdamW(self.parameters(), lr=0.003)


class CountingLanguageModel(LanguageModel):
    """Says what its loss is a mean over."""

    def loss_terms(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens are predicted."""
        return (batch["labels"][:, 1:] != -100).sum()


def first_gradient(model: LanguageModel, max_device_batch_size: int | None) -> float:
    """Train with a growing batch; return the norm of the first step's gradient."""
    scheduler = BatchLRScheduler(
        batch_size=Exponential(16, factor=2, every=2, unit="epoch"),
        lr=Exponential(0.003, factor=1.4, every=2, unit="epoch"),
        max_device_batch_size=max_device_batch_size,
    )
    loader = DataLoader(Sentences(128), batch_size=16, shuffle=True, collate_fn=pad)
    torch.manual_seed(1)  # the order of the sentences
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        callbacks=[scheduler],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    return model.first_norm


def main() -> None:
    """Print the gradients."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("norm of the first step's gradient, 16 sentences:")
    print(f"  in one piece                               {first_gradient(LanguageModel(), None):.6f}")
    print(f"  in micro-batches of 2, without loss_terms  {first_gradient(LanguageModel(), 2):.6f}")
    print(f"  in micro-batches of 2, with loss_terms     {first_gradient(CountingLanguageModel(), 2):.6f}")


if __name__ == "__main__":
    main()
