"""Sentences of uneven lengths, and a small language model of them in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from harness.modules import filled


class Sentences(Dataset[Any]):
    """Tokens of uneven lengths, with the index of each sentence.

    Args:
        longest: Tokens of the longest.
        number: Of sentences.
    """

    def __init__(self, longest: int, number: int = 61) -> None:
        generator = torch.Generator().manual_seed(2)
        self.sizes = torch.randint(2, longest + 1, (number,), generator=generator)
        self.tokens = [torch.randint(1, 12, (int(size),), generator=generator) for size in self.sizes]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Any:
        return self.tokens[index], index


def pad(examples: list[Any]) -> Any:
    """A batch of sentences: 0 is padding, whose label is -100."""
    tokens = nn.utils.rnn.pad_sequence([tokens for tokens, _ in examples], batch_first=True)
    return {"tokens": tokens, "labels": tokens.where(tokens > 0, -100), "index": torch.tensor([i for _, i in examples])}


class Predictor(LightningModule):
    """Predicts the next token from the one before; a subclass says what its loss is.

    Args:
        dropout: Probability.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = filled(nn.Sequential(nn.Embedding(12, 4), nn.Tanh(), nn.Linear(4, 12)).double())
        self.drop = nn.Dropout(dropout)

    def logits(self, batch: Any) -> Tensor:
        """Of the tokens that follow."""
        return self.drop(self.net(batch["tokens"]))[:, :-1]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.3, momentum=0.9)


class _Trainable(Protocol):
    def configure_optimizers(self) -> Any: ...
    def parameters(self) -> Any: ...
    def loss(self, batch: Any) -> Tensor: ...


M = TypeVar("M", bound=_Trainable)


def train_sentences_by_hand(model: M, sentences: Sentences, steps: Iterable[list[int]], clip: float | None = None) -> M:
    """Whole steps, in plain PyTorch.

    Args:
        model: What is trained, by its `loss` and its optimizer.
        sentences: The examples.
        steps: The indices of each step.
        clip: Norm that gradients are clipped to.
    """
    optimizer = model.configure_optimizers()
    for step in steps:
        optimizer.zero_grad()
        model.loss(pad([sentences[i] for i in step])).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model
