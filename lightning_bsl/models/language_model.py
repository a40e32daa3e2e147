"""The LightningModule that trains a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity

from lightning_bsl.models.classifier import compile_in_place


class CausalLM(LightningModule):
    """Train a network to predict the next token; batch size and learning rate are left to the callbacks.

    A batch is tokens ``[batch, length]``, whole sequences without padding. The loss is the mean cross-entropy of all tokens
    but the first of each sequence, which nothing precedes; as the sequences have one length, it is a mean over sequences,
    and every sequence weighs alike however the batches are cut.

    Logs ``train/loss`` of every ``log_every_n_steps``-th step and, under that name too, its mean over the epoch; then
    ``val/loss``, ``val/perplexity``, ``test/loss``, ``test/perplexity``. The mean of a training epoch is of the weights as
    they were at each step; after a resume inside an epoch it covers the rest of it.

    Matrices decay, the embeddings among them, as in the trainers of GPT-2 and of `transformers`; biases and the weights of
    LayerNorm do not, whatever ``weight_decay`` the optimizer has.

    Args:
        net: Its output for tokens ``[batch, length]`` has ``logits`` ``[batch, length, vocab_size]``, as of every causal
            language model of `transformers`.
        optimizer: Makes the optimizer from groups of parameters; AdamW with learning rate 0.001 by default.
        compile: Compile the network, once for all batch sizes. The keys of its ``state_dict`` stay as they are.

    Raises:
        ValueError: At fit start: sequences longer than the network has positions for, more tokens in the tokenizer than
            in the network, or pretrained weights with a tokenizer of another vocabulary.

    Example:
        >>> import torch
        >>> from lightning_bsl.models import CausalLM, distilgpt2
        >>> model = CausalLM(distilgpt2(vocab_size=100, n_positions=16, n_layer=1, n_embd=8, n_head=2))
        >>> model(torch.zeros(3, 16, dtype=torch.long)).shape
        torch.Size([3, 16, 100])
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self._compile = compile
        self._make_optimizer = optimizer
        self.train_loss = MeanMetric(nan_strategy="disable")  # a check for NaN would wait for the GPU at every step
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.val_perplexity = Perplexity()
        self.test_loss = MeanMetric(nan_strategy="disable")
        self.test_perplexity = Perplexity()

    def setup(self, stage: str) -> None:
        """Compare the network with the data."""
        data, config = getattr(self.trainer, "datamodule", None), getattr(self.net, "config", None)
        length, vocab_size = getattr(data, "tokens_per_sample", None), getattr(data, "vocab_size", None)
        positions = getattr(config, "max_position_embeddings", None)
        if length is not None and positions is not None and length > positions:
            raise ValueError(
                f"the sequences of the data have {length} tokens, but the network has positions for {positions} only; write "
                f"`block_size={positions}` for the data, or `n_positions={length}` for the network"
            )
        if vocab_size is not None and config is not None and vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer of the data has up to {vocab_size} tokens, but the network knows {config.vocab_size} only; "
                f"write `vocab_size={vocab_size}` for the network"
            )
        if getattr(data, "trained_tokenizer", False) and getattr(config, "name_or_path", ""):
            raise ValueError(
                "pretrained weights go with the tokenizer they were trained with, but the data have one of their own; write "
                "`tokenizer=...` for the data, a folder with the model's tokenizer.json (`tokenizer=gpt2` downloads GPT-2's)"
            )

    def configure_model(self) -> None:
        """Set up compilation, before the optimizer is made; harmless when called again."""
        if self._compile:
            compile_in_place(self.net)
            self._compile = False

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer; there is no learning-rate scheduler."""
        parameters = [each for each in self.parameters() if each.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [each for each in parameters if each.ndim >= 2]},
            {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
        ]
        make = self._make_optimizer or (lambda groups: AdamW(groups, lr=0.001))
        return make([group for group in groups if group["params"]])

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[batch, length]`` to logits ``[batch, length, vocab_size]`` of the tokens that follow them."""
        logits: Tensor = self.net(tokens).logits
        return logits

    def full_loss(self, batch: Tensor) -> Tensor:
        """The batch's mean loss, without logging: for what looks at the loss from outside."""
        return _loss(self(batch), batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the batch's mean loss, and log it where the Trainer's loggers will write it."""
        loss = self.full_loss(batch)
        # given once for each sequence: with "disable", torchmetrics 1.9 ignores weights
        self.train_loss.update(loss.detach().expand(len(batch)))
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:  # the others would be dropped, and log() is slow
            self.log("train/loss", loss, on_step=True, on_epoch=False)
        self._step_loss = loss.detach()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Log the last step too: Lightning writes a row when a callback has just stopped the run."""
        if self.trainer.should_stop:
            self.log("train/loss", self._step_loss, on_step=True, on_epoch=False)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean; Lightning resets the metric after it has read it."""
        self.log("train/loss", self.train_loss)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, self.val_loss, self.val_perplexity)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self.log("val/loss", self.val_loss)
        self.log("val/perplexity", self.val_perplexity, prog_bar=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate(batch, self.test_loss, self.test_perplexity)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self.log("test/loss", self.test_loss)
        self.log("test/perplexity", self.test_perplexity)

    def _evaluate(self, batch: Tensor, loss: MeanMetric, perplexity: Perplexity) -> None:
        logits = self(batch)
        loss.update(_loss(logits, batch).expand(len(batch)))
        perplexity.update(logits[:, :-1].float(), batch[:, 1:])  # its softmax is taken in their precision


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens ``[batch, length]`` but the first, by the logits of those before them."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
