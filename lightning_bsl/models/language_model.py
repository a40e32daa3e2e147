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

NO_TARGET = -100  # the label that cross-entropy and `transformers` ignore


class CausalLM(LightningModule):
    """Trains a causal language model: a network that predicts the next token. The callbacks set batch size and learning rate.

    **Sequences of one length.** A batch is a tensor of tokens ``[batch, length]``, without padding. The loss is the mean
    cross-entropy of all tokens except the first of each sequence. Since all sequences have the same length, it is a mean over
    sequences, and all sequences have the same weight for any batch sizes.

    **Sequences of several lengths.** A batch is a mapping (a dict, or a ``BatchEncoding`` of `transformers`) of integer tensors
    ``[batch, length]``: ``input_ids``; ``attention_mask`` if there is padding (0 for padding, at either end); ``labels`` if not
    all tokens are to be learned (-100 for tokens that are not). Other entries are ignored. As in `transformers`, the label of a
    position is predicted from the positions before it, and by default it is the token itself. The first token of a sequence is
    not predicted, with padding at either end. The loss is the mean over all predicted labels, so all **tokens** have the same
    weight; ``loss_terms`` counts them. Padding is moved to the right before the network gets the tokens, so that positions
    count from the first token without ``position_ids``. A batch without predicted labels has the loss NaN.

    **Metrics.** The module logs ``train/loss`` of every ``log_every_n_steps``-th step and, under the same name, its mean over
    the epoch; also ``val/loss``, ``val/perplexity``, ``test/loss`` and ``test/perplexity``. All are means over the terms of the
    loss (sequences or tokens), and ignore batches without terms. The mean of a training epoch uses the weights of each step;
    after a resume inside an epoch it is over the rest of the epoch.

    **Weight decay.** The optimizer's ``weight_decay`` applies to matrices, including the embeddings, as in the trainers of
    GPT-2 and of `transformers`. It does not apply to biases and to the weights of LayerNorm.

    Args:
        net: A network whose output for tokens ``[batch, length]`` has ``logits`` ``[batch, length, vocab_size]``, like every
            causal language model of `transformers`. It is called as ``net(tokens, attention_mask=mask)`` if the batch has a
            mask.
        optimizer: Makes the optimizer from groups of parameters; by default AdamW with learning rate 0.001.
        compile: Whether to compile the network, once for all batch sizes. The keys of its ``state_dict`` do not change.

    Raises:
        ValueError: A batch that is neither a tensor of tokens nor a mapping with ``input_ids``. At the start of a fit:
            sequences that are longer than the network allows, a tokenizer with more tokens than the network, or pretrained
            weights with another tokenizer.

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
        """Check that the network fits the data."""
        data, config = getattr(self.trainer, "datamodule", None), getattr(self.net, "config", None)
        sample, longest = getattr(data, "tokens_per_sample", None), getattr(data, "block_size", None)
        length, vocab_size = sample or longest, getattr(data, "vocab_size", None)
        positions = getattr(config, "max_position_embeddings", None)
        if length is not None and positions is not None and length > positions:
            raise ValueError(
                f"the sequences of the data have {'' if sample else 'up to '}{length} tokens, but the network has only "
                f"{positions} positions; write `block_size={positions}` for the data, or `n_positions={length}` for the network"
            )
        if vocab_size is not None and config is not None and vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer of the data has up to {vocab_size} tokens, but the network has only {config.vocab_size}; write "
                f"`vocab_size={vocab_size}` for the network"
            )
        if getattr(data, "trained_tokenizer", False) and getattr(config, "name_or_path", ""):
            raise ValueError(
                "pretrained weights need the tokenizer they were trained with, but the data train a tokenizer of their own; "
                "write `tokenizer=...` for the data: a folder with the model's tokenizer.json (`tokenizer=gpt2` downloads "
                "GPT-2's)"
            )

    def configure_model(self) -> None:
        """Set up compilation, before the optimizer is made. A second call changes nothing."""
        if self._compile:
            compile_in_place(self.net)
            self._compile = False

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer; there is no learning-rate scheduler."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in parameters if parameter.ndim >= 2]},
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        make = self._make_optimizer or (lambda groups: AdamW(groups, lr=0.001))
        return make([group for group in groups if group["params"]])

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map tokens ``[batch, length]`` to logits ``[batch, length, vocab_size]`` of the next tokens.

        Args:
            tokens: The tokens.
            attention_mask: 0 for padding, ``[batch, length]``; the network gets it as it is.
        """
        options = {} if attention_mask is None else {"attention_mask": attention_mask}
        logits: Tensor = self.net(tokens, **options).logits
        return logits

    def full_loss(self, batch: Batch) -> Tensor:
        """The batch's mean loss, without logging: for measurements such as ``FullGradientNorm``."""
        return _loss(*self._predict(batch))

    def loss_terms(self, batch: Batch) -> int | Tensor:
        """The number of terms that the batch's mean loss is a mean over.

        Args:
            batch: A batch as the class describes it.

        Returns:
            For a tensor of tokens the number of sequences; for a mapping the number of predicted labels, as a scalar tensor on
            the batch's device.
        """
        return len(batch) if isinstance(batch, Tensor) else (_targets(batch) != NO_TARGET).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the batch's mean loss, and log it at the steps that the Trainer's loggers write."""
        loss, terms = self.full_loss(batch), self.loss_terms(batch)
        self._step_loss, self._step_terms = loss.detach(), terms
        _update(self.train_loss, self._step_loss, terms)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:  # other values would be dropped, and log() is slow
            self._log_step()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the last step too: Lightning writes a row when a callback stops the run."""
        if self.trainer.should_stop:
            self._log_step()

    def on_train_epoch_end(self) -> None:
        """Log the mean of the epoch. Lightning resets the metric afterwards."""
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
        if self._step_terms:  # not NaN; without a value Lightning repeats the last one; only here, since it waits for the GPU
            self.log("train/loss", self._step_loss, on_step=True, on_epoch=False)

    def _evaluate(self, batch: Batch, mean: CompositionalMetric, perplexity: Perplexity) -> None:
        logits, targets = self._predict(batch)
        _update(mean, _loss(logits, targets), self.loss_terms(batch))
        perplexity.update(logits.float(), targets)  # float, since its softmax has the precision of the logits

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, positions, vocab_size]``, and targets ``[batch, positions]``, ``NO_TARGET`` where there is none."""
        if isinstance(batch, Tensor):
            return self(batch)[:, :-1], batch[:, 1:]
        targets, tokens, mask = _targets(batch), batch["input_ids"], batch.get("attention_mask")
        if mask is None:
            return self(tokens), targets
        order = (mask == 0).int().argsort(dim=1, stable=True)  # moves padding to the right
        return self(tokens.gather(1, order), mask.gather(1, order)), targets.gather(1, order)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=NO_TARGET)


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """The target of each position ``[batch, length]``, ``NO_TARGET`` where there is none."""
    is_mapping = isinstance(batch, Mapping)
    tokens = batch.get("input_ids") if is_mapping else None
    if not isinstance(tokens, Tensor):
        kind = f"a mapping with {', '.join(map(str, batch)) or 'nothing'}" if is_mapping else type(batch).__name__
        raise ValueError(
            f"a batch must be a tensor of tokens [batch, length], or a mapping with such a tensor in `input_ids`; got {kind}"
        )
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    targets = (tokens if labels is None else labels).roll(-1, dims=1)
    targets[:, -1:] = NO_TARGET
    if mask is None:
        return targets
    padding = mask == 0
    next_padding = padding.roll(-1, dims=1)
    # the first token after padding at the left is not predicted; padding itself is predicted only if `labels` say so
    ignored = padding | next_padding if labels is None else padding & ~next_padding
    return targets.masked_fill(ignored, NO_TARGET)


def _mean_over_terms() -> CompositionalMetric:
    """A sum of losses divided by the number of terms, without checks for NaN, which would wait for the GPU at every step.

    ``MeanMetric`` does not work here: without these checks, torchmetrics 1.9 ignores its weights.
    """
    return SumMetric(nan_strategy="disable") / SumMetric(nan_strategy="disable")


def _update(mean: CompositionalMetric, loss: Tensor, terms: int | Tensor) -> None:
    """Add the mean loss of a batch to the mean. A batch without terms, whose loss is NaN, adds nothing."""
    if isinstance(terms, Tensor):
        total = loss.float().where(terms > 0, 0.0) * terms
    else:
        total = loss.expand(terms)
        terms = torch.full((), terms, device=loss.device)  # made on the GPU; a number would be copied to it
    mean.metric_a.update(total)  # type: ignore[union-attr]
    mean.metric_b.update(terms)  # type: ignore[union-attr]
