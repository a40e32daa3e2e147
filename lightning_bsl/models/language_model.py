"""The LightningModule that trains a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import SumMetric
from torchmetrics.metric import CompositionalMetric
from torchmetrics.text import Perplexity

from lightning_bsl.models.classifier import compile_in_place

Batch = Tensor | Mapping[str, Tensor]

NO_TARGET = -100  # the label that cross-entropy and `transformers` leave out


class CausalLM(LightningModule):
    """Train a network to predict the next token; batch size and learning rate are left to the callbacks.

    A batch is tokens ``[batch, length]``, whole sequences without padding. The loss is the mean cross-entropy of all tokens
    but the first of each sequence, which nothing precedes; as the sequences have one length, it is a mean over sequences,
    and every sequence weighs alike however the batches are cut.

    Sequences of several lengths come padded, as a mapping (a dict, a ``BatchEncoding`` of `transformers`) of integers
    ``[batch, length]``: ``input_ids``; where there is padding, ``attention_mask``, 0 for padding, at either end; where not
    every token is to be learned, ``labels``, -100 for what is not. Other entries are not used. The label of a position is
    predicted from the positions before it, as in `transformers`, and is the token itself by default. The loss is the mean
    over all labels that are predicted, so that every **token** weighs alike; ``loss_terms`` counts them. The first token of a
    sequence is not predicted, whichever end the padding is at. The network is given all padding at the right: positions then
    count from the first token, without ``position_ids``. A batch without anything to predict has the loss NaN.

    Logs ``train/loss`` of every ``log_every_n_steps``-th step and, under that name too, its mean over the epoch; then
    ``val/loss``, ``val/perplexity``, ``test/loss``, ``test/perplexity``. All are means over the terms of the loss, sequences or
    tokens, and a batch without any leaves no trace in them. The mean of a training epoch is of the weights as they were at
    each step; after a resume inside an epoch it covers the rest of it.

    Matrices decay, the embeddings among them, as in the trainers of GPT-2 and of `transformers`; biases and the weights of
    LayerNorm do not, whatever ``weight_decay`` the optimizer has.

    Args:
        net: Its output for tokens ``[batch, length]`` has ``logits`` ``[batch, length, vocab_size]``, as of every causal
            language model of `transformers`. Called ``net(tokens, attention_mask=mask)`` where the batch has a mask.
        optimizer: Makes the optimizer from groups of parameters; AdamW with learning rate 0.001 by default.
        compile: Compile the network, once for all batch sizes. The keys of its ``state_dict`` stay as they are.

    Raises:
        ValueError: A batch that is neither tokens nor a mapping with ``input_ids``. At fit start: sequences longer than the
            network has positions for, more tokens in the tokenizer than in the network, or pretrained weights with a
            tokenizer of another vocabulary.

    Example:
        >>> import torch
        >>> from lightning_bsl.models import CausalLM, distilgpt2
        >>> model = CausalLM(distilgpt2(vocab_size=100, n_positions=16, n_layer=1, n_embd=8, n_head=2))
        >>> model(torch.zeros(3, 16, dtype=torch.long)).shape
        torch.Size([3, 16, 100])
        >>> padded = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
        >>> model.loss_terms(padded)
        tensor(3)
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
        self.train_loss = _mean_over_terms()
        self.val_loss = _mean_over_terms()
        self.val_perplexity = Perplexity(ignore_index=NO_TARGET)
        self.test_loss = _mean_over_terms()
        self.test_perplexity = Perplexity(ignore_index=NO_TARGET)

    def setup(self, stage: str) -> None:
        """Compare the network with the data."""
        data, config = getattr(self.trainer, "datamodule", None), getattr(self.net, "config", None)
        sample, longest = getattr(data, "tokens_per_sample", None), getattr(data, "block_size", None)
        length, vocab_size = sample or longest, getattr(data, "vocab_size", None)
        positions = getattr(config, "max_position_embeddings", None)
        if length is not None and positions is not None and length > positions:
            raise ValueError(
                f"the sequences of the data have {'' if sample else 'up to '}{length} tokens, but the network has positions "
                f"for {positions} only; write `block_size={positions}` for the data, or `n_positions={length}` for the network"
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

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map tokens ``[batch, length]`` to logits ``[batch, length, vocab_size]`` of the tokens that follow them.

        Args:
            tokens: The tokens.
            attention_mask: 0 for padding, ``[batch, length]``; given to the network as it is.
        """
        options = {} if attention_mask is None else {"attention_mask": attention_mask}
        logits: Tensor = self.net(tokens, **options).logits
        return logits

    def full_loss(self, batch: Batch) -> Tensor:
        """The batch's mean loss, without logging: for what looks at the loss from outside."""
        return _loss(*self._predict(batch))

    def loss_terms(self, batch: Batch) -> int | Tensor:
        """How many terms the batch's mean loss is a mean over.

        Args:
            batch: As of the class.

        Returns:
            The number of sequences of a tensor of tokens; of a mapping the number of labels that are predicted, a scalar
            on the batch's device.
        """
        return len(batch) if isinstance(batch, Tensor) else (_targets(batch) != NO_TARGET).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the batch's mean loss, and log it where the Trainer's loggers will write it."""
        loss, terms = self.full_loss(batch), self.loss_terms(batch)
        self._step_loss, self._step_terms = loss.detach(), terms
        _update(self.train_loss, self._step_loss, terms)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:  # the others would be dropped, and log() is slow
            self._log_step()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the last step too: Lightning writes a row when a callback has just stopped the run."""
        if self.trainer.should_stop:
            self._log_step()

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean; Lightning resets the metric after it has read it."""
        self.log("train/loss", self.train_loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, self.val_loss, self.val_perplexity)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self.log("val/loss", self.val_loss)
        self.log("val/perplexity", self.val_perplexity, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate(batch, self.test_loss, self.test_perplexity)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self.log("test/loss", self.test_loss)
        self.log("test/perplexity", self.test_perplexity)

    def _log_step(self) -> None:
        if self._step_terms:  # else NaN, and Lightning writes the loss before; asked here only, as it waits for the GPU
            self.log("train/loss", self._step_loss, on_step=True, on_epoch=False)

    def _evaluate(self, batch: Batch, mean: CompositionalMetric, perplexity: Perplexity) -> None:
        logits, targets = self._predict(batch)
        _update(mean, _loss(logits, targets), self.loss_terms(batch))
        perplexity.update(logits.float(), targets)  # its softmax is taken in their precision

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, positions, vocab_size]``, and what each position is to predict, ``NO_TARGET`` for nothing."""
        if isinstance(batch, Tensor):
            return self(batch)[:, :-1], batch[:, 1:]
        targets, tokens, mask = _targets(batch), batch["input_ids"], batch.get("attention_mask")
        if mask is None:
            return self(tokens), targets
        order = (mask == 0).int().argsort(dim=1, stable=True)  # padding to the right
        return self(tokens.gather(1, order), mask.gather(1, order)), targets.gather(1, order)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=NO_TARGET)


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """What each position is to predict ``[batch, length]``, ``NO_TARGET`` for nothing."""
    is_mapping = isinstance(batch, Mapping)
    tokens = batch.get("input_ids") if is_mapping else None
    if not isinstance(tokens, Tensor):
        found = f"a mapping with {', '.join(map(str, batch)) or 'nothing'}" if is_mapping else type(batch).__name__
        raise ValueError(
            f"a batch must be a tensor of tokens [batch, length], or a mapping with such a tensor in `input_ids`; got {found}"
        )
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    targets = (tokens if labels is None else labels).roll(-1, dims=1)
    targets[:, -1:] = NO_TARGET
    if mask is None:
        return targets
    padding = mask == 0
    next_padding = padding.roll(-1, dims=1)
    # the first token behind padding follows nothing; padding is predicted only where labels say so
    ignored = padding | next_padding if labels is None else padding & ~next_padding
    return targets.masked_fill(ignored, NO_TARGET)


def _mean_over_terms() -> CompositionalMetric:
    """A sum of losses over the number of terms; without checks for NaN, which would wait for the GPU at every step.

    It is no ``MeanMetric``: without those checks, that of torchmetrics 1.9 ignores its weights.
    """
    return SumMetric(nan_strategy="disable") / SumMetric(nan_strategy="disable")


def _update(mean: CompositionalMetric, loss: Tensor, terms: int | Tensor) -> None:
    """Add the mean loss of a batch to the mean; without terms it is NaN, and adds nothing."""
    if isinstance(terms, Tensor):
        total = loss.float().where(terms > 0, 0.0) * terms
    else:
        total = loss.expand(terms)
        terms = torch.full((), terms, device=loss.device)  # a number would be copied to the GPU
    mean.metric_a.update(total)  # type: ignore[union-attr]
    mean.metric_b.update(terms)  # type: ignore[union-attr]
