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
    """Trains an image classifier on batches ``(images, labels)``. The callbacks set batch size and learning rate.

    It logs ``train/loss`` of every ``log_every_n_steps``-th step and, under the same name, its mean over the epoch; also
    ``train/accuracy``, ``val/loss``, ``val/accuracy``, ``test/loss`` and ``test/accuracy``. All examples have the same weight
    in every mean, for any batch sizes. The means of a training epoch use the weights of each step; after a resume inside an
    epoch they are over the rest of the epoch.

    Args:
        net: Maps images ``[batch, C, H, W]`` to logits ``[batch, num_classes]``.
        num_classes: Number of classes.
        optimizer: Makes the optimizer from the parameters; by default plain SGD with learning rate 0.1, as in Umeda & Iiduka
            2025 (arXiv 2409.08770).
        loss: Maps logits and labels ``[batch]`` to the **mean** loss of the batch; by default cross-entropy.
        compile: Whether to compile the network, once for all batch sizes. The keys of its ``state_dict`` do not change.
        channels_last: Whether to keep weights and images in channels-last memory order, which makes convolutions faster on CPUs
            and recent GPUs.

    Raises:
        ValueError: At the start of a fit: fewer classes than the data say they have.

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
        self.num_classes = num_classes
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self._make_optimizer = optimizer
        self._compile = compile
        self._channels_last = channels_last
        self._memory_format = torch.contiguous_format  # of the network, until `configure_model`
        # No checks for NaN and for the range of labels: they would wait for the GPU at every step. The training accuracy is a
        # mean of hits, the same number as MulticlassAccuracy's, whose update takes 80 us instead of 30. The loss is repeated
        # for each example, because with "disable" torchmetrics 1.9 ignores weights.
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_accuracy = MeanMetric(nan_strategy="disable")
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_loss = MeanMetric(nan_strategy="disable")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def setup(self, stage: str) -> None:
        """Check that there are as many classes as in the data, where those say how many they have."""
        number = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if isinstance(number, int) and number > self.num_classes:
            raise ValueError(
                f"the data have {number} classes, but the model has `num_classes={self.num_classes}`: write "
                f"`num_classes={number}`"
            )

    def configure_model(self) -> None:
        """Set memory order and compilation, before the optimizer is made. A second call changes nothing."""
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
        """The batch's mean loss, without logging: for measurements such as ``FullGradientNorm``."""
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the batch's mean loss, and log it at the steps that the Trainer's loggers write."""
        images, labels = batch
        logits = self(images)
        loss: Tensor = self.loss(logits, labels)
        self.train_loss.update(loss.detach().expand(len(labels)))
        self.train_accuracy.update(logits.detach().argmax(dim=1) == labels)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:  # other values would be dropped, and log() is slow
            self.log("train/loss", loss, on_step=True, on_epoch=False)
        self._step_loss = loss.detach()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the last step too: Lightning writes a row when a callback stops the run."""
        if self.trainer.should_stop:
            self.log("train/loss", self._step_loss, on_step=True, on_epoch=False)

    def on_train_epoch_end(self) -> None:
        """Log the means of the epoch. Lightning resets the metrics afterwards."""
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
    """Compile a module in place. The keys of its ``state_dict`` do not change.

    It replaces ``net.compile(dynamic=True)``, which has two flaws. In torch 2.4 it does not compile a ``Sequential``. And the
    compilations of all modules of a process count towards one limit, above which it silently stops to compile.

    Args:
        net: The module.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return net._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # a copy for this module, since compilations are stored and counted per code object
    net._compiled_call_impl = torch.compile(call, dynamic=True)
