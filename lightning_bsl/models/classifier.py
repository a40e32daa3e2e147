"""The LightningModule that trains an image classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Train a network on ``(images, labels)`` batches; batch size and learning rate are left to the callbacks.

    Logs ``train/loss`` of every ``log_every_n_steps``-th step and, under that name too, its mean over the epoch; then
    ``train/accuracy``, ``val/loss``, ``val/accuracy``, ``test/loss``, ``test/accuracy``. Every mean weighs each example
    alike, however the batches are cut. The means of a training epoch are of the weights as they were at each step;
    after a resume inside an epoch they cover the rest of it.

    Args:
        net: Maps images ``[batch, C, H, W]`` to logits ``[batch, num_classes]``.
        num_classes: Number of classes.
        optimizer: Makes the optimizer from the parameters; plain SGD with learning rate 0.1 (P1) by default.
        loss: Maps logits and labels ``[batch]`` to the batch's **mean** loss; cross-entropy by default.
        compile: Compile the network, once for all batch sizes. The keys of its ``state_dict`` stay as they are.
        channels_last: Keep weights and images in channels-last memory order, faster for convolutions on CPUs and recent GPUs.

    Example:
        >>> from lightning_bsl.models import Classifier, cnn5
        >>> model = Classifier(cnn5(), num_classes=10)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        loss: nn.Module | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self._make_optimizer = optimizer
        self._compile = compile
        self._channels_last = channels_last
        self._memory_format = torch.contiguous_format  # of the network, until the Trainer configures it
        # Checks for NaN and for the range of labels would wait for the GPU at every step. In training a mean of hits
        # stands for the accuracy: the same number as MulticlassAccuracy's, whose update takes 80 us against 30. Losses
        # are given once for each example because, with "disable", torchmetrics 1.9 ignores the weights.
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_accuracy = MeanMetric(nan_strategy="disable")
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_loss = MeanMetric(nan_strategy="disable")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def configure_model(self) -> None:
        """Set memory order and compilation, before the optimizer is made; harmless when called again."""
        if self._channels_last:
            self._memory_format = torch.channels_last
            self.net.to(memory_format=self._memory_format)
        if self._compile:
            compile_in_place(self.net)
            self._compile = False

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer; there is no learning-rate scheduler."""
        make = self._make_optimizer or (lambda parameters: SGD(parameters, lr=0.1))
        return make(self.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[batch, C, H, W]`` to logits ``[batch, num_classes]``."""
        if self._memory_format is torch.channels_last:
            images = images.to(memory_format=self._memory_format)
        logits: Tensor = self.net(images)
        return logits

    def full_loss(self, batch: Batch) -> Tensor:
        """The batch's mean loss, without logging: for what looks at the loss from outside."""
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the batch's mean loss, and log it where the Trainer's loggers will write it."""
        images, labels = batch
        logits = self(images)
        loss: Tensor = self.loss(logits, labels)
        self.train_loss.update(loss.detach().expand(len(labels)))
        self.train_accuracy.update(logits.detach().argmax(dim=1) == labels)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:  # the others would be dropped, and log() is slow
            self.log("train/loss", loss, on_step=True, on_epoch=False)
        self._step_loss = loss.detach()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the last step too: Lightning writes a row when a callback has just stopped the run."""
        if self.trainer.should_stop:
            self.log("train/loss", self._step_loss, on_step=True, on_epoch=False)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means; Lightning resets the metrics after it has read them."""
        self.log("train/loss", self.train_loss)
        self.log("train/accuracy", self.train_accuracy)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, self.val_loss, self.val_accuracy)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self.log("val/loss", self.val_loss)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate(batch, self.test_loss, self.test_accuracy)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self.log("test/loss", self.test_loss)
        self.log("test/accuracy", self.test_accuracy)

    def _evaluate(self, batch: Batch, loss: MeanMetric, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        loss.update(self.loss(logits, labels).expand(len(labels)))
        accuracy.update(logits, labels)


def compile_in_place(net: nn.Module) -> None:
    """Compile a module in place, which leaves the keys of its ``state_dict`` as they are.

    As ``net.compile(dynamic=True)``, which has two flaws: in torch 2.4 it leaves a ``Sequential`` uncompiled, and everywhere
    the compilations of all the modules of a process count towards one limit, beyond which it silently compiles no more.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return net._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # a copy for this module: compilations are kept, and counted, with the code
    net._compiled_call_impl = torch.compile(call, dynamic=True)
