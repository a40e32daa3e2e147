"""A DataModule whose batch size follows a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_bsl.data.lengths import Lengths
from lightning_bsl.data.sampler import GlobalBatchSampler, remade
from lightning_bsl.schedules import Progress
from lightning_bsl.schedules.checks import check_whole


def data_parallel(trainer: Trainer) -> tuple[int, int]:
    """The index of this process among those that share a batch, and their number.

    These are all processes, except with tensor parallelism: processes that hold parts of one model train on the same examples.

    Args:
        trainer: The Trainer.
    """
    arguments = trainer.distributed_sampler_kwargs
    return (arguments["rank"], arguments["num_replicas"]) if arguments else (0, 1)


def to_precision(datamodule: LightningDataModule, batch: Any) -> Any:
    """Convert what a DataModule computed on the device to the Trainer's precision; Lightning converts only loaded batches.

    Args:
        datamodule: The DataModule; without a Trainer nothing is converted.
        batch: The batch, or a part of it.
    """
    plugin = getattr(datamodule.trainer, "precision_plugin", None)
    return batch if plugin is None else plugin.convert_input(batch)


class BatchSizeDataModule(LightningDataModule):
    """A DataModule for any map-style data sets, whose batch size can follow a schedule.

    With the callback [`BatchLRScheduler`][lightning_bsl.BatchLRScheduler] the batch size follows its schedule, inside an epoch
    too. Without it, the batch size is ``batch_size``. The batch size is global: the examples of one optimizer step over all
    processes.

    Args:
        train: Training set. Subclasses may set ``train_set``, ``val_set`` and ``test_set`` in ``setup`` instead.
        val: Validation set.
        test: Test set.
        batch_size: Global batch size without a schedule.
        eval_batch_size: Batch size for validation and test, per process.
        num_workers: Number of worker processes of each loader; they live as long as the loader.
        multiprocessing_context: How to start the workers: ``"fork"``, ``"forkserver"`` or ``"spawn"``; by default as usual on
            the platform. In a run of several processes on CPUs (gloo) a forked worker sometimes hangs: write ``"forkserver"``.
        pin_memory: Whether to copy batches to pinned memory; by default if CUDA is available.
        collate_fn: The same as for ``torch.utils.data.DataLoader``.
        seed: Seed of the order of the training examples.
        shuffle: Whether to shuffle the training examples.
        samples_per_epoch: Number of training examples per epoch, drawn at random; by default all.
        drop_last: Whether to leave out a last step of an epoch that has fewer examples than the batch size.
        lengths: The length of each training example, 1 or more: a sequence, an array or a tensor; or a function of an example,
            which is called once for each example when the lengths are first needed. By default the attribute ``lengths`` of the
            training set, if there is one. ``BatchLRScheduler`` then divides each step among the processes and into
            micro-batches so that examples of similar length are padded together. The examples of a step stay the same.
            (``GradientNoiseScale`` then counts the difference between short and long examples as noise, too.)
        max_device_tokens: Largest number of padded tokens that one process puts through the model at once: the length of the
            longest example of a micro-batch x the number of its examples. It needs ``lengths`` and ``BatchLRScheduler``.

    Raises:
        ValueError: A size below 1. When the loader is made: ``max_device_tokens`` without lengths, or below the longest of
            them; the number of lengths is not the number of training examples; a length below 1.
        TypeError: When the loader is made: a training set without a length (an ``IterableDataset``), or lengths that are not
            numbers.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> datamodule = BatchSizeDataModule(TensorDataset(torch.arange(10)), batch_size=4)
        >>> len(datamodule.train_dataloader())
        3
    """

    tokens_per_sample: int | None = None  # length of the sequences, if all have the same: needed by schedules in tokens

    def __init__(
        self,
        # not `Dataset[Any]`: with this type LightningCLI passes no arguments to a data set
        train: Dataset | None = None,  # type: ignore[type-arg]
        val: Dataset | None = None,  # type: ignore[type-arg]
        test: Dataset | None = None,  # type: ignore[type-arg]
        *,
        batch_size: int = 32,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        multiprocessing_context: str | None = None,
        pin_memory: bool | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        samples_per_epoch: int | None = None,
        drop_last: bool = False,
        # not the exact types: LightningCLI does not know arrays
        lengths: Any = None,
        max_device_tokens: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            check_whole(name, value)
        check_whole("samples_per_epoch", samples_per_epoch, or_none=True)
        check_whole("max_device_tokens", max_device_tokens, instead=", or None for no bound", or_none=True)
        self.train_set, self.val_set, self.test_set = train, val, test
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.multiprocessing_context = multiprocessing_context
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.collate_fn = collate_fn
        self.seed = seed
        self.shuffle = shuffle
        self.samples_per_epoch = samples_per_epoch
        self.drop_last = drop_last
        self.lengths = lengths
        self.max_device_tokens = max_device_tokens
        self._lengths: tuple[Any, Lengths] | None = None  # a training set, and its lengths
        self._train_loader: DataLoader[Any] | None = None

    @property
    def num_train_examples(self) -> int:
        """Examples of the training set.

        Raises:
            ValueError: There is no training set.
            TypeError: The training set has no length.
        """
        if self.train_set is None:
            raise ValueError("there is no training set; give `train`, or set `train_set` in `setup`")
        if isinstance(self.train_set, IterableDataset) or not hasattr(self.train_set, "__len__"):
            raise TypeError(
                f"the training set {type(self.train_set).__name__} has no length, so its batches cannot be planned; "
                "wrap a map-style data set (with `__len__` and `__getitem__`)"
            )
        return len(cast(Sized, self.train_set))

    @property
    def num_epoch_examples(self) -> int:
        """Training examples of one epoch.

        Raises:
            ValueError: ``samples_per_epoch`` is above the examples of the training set.
        """
        number, most = self.samples_per_epoch, self.num_train_examples
        if number is not None and number > most:
            raise ValueError(
                f"`samples_per_epoch={number}` must be at most the {most} examples of the training set: write {most} or less, "
                "or leave it out"
            )
        return number or most

    def known_lengths(self) -> Lengths | None:
        """The lengths of the training examples with ``max_device_tokens``; ``None`` if they are not known.

        Raises:
            ValueError: ``max_device_tokens`` without lengths.
        """
        dataset: Any = self.train_set
        lengths, number = self.lengths, self.num_train_examples
        if self._lengths is None or self._lengths[0] is not dataset:
            if lengths is None:
                attribute = getattr(dataset, "lengths", None)
                # an attribute of another length has another meaning
                lengths = attribute if isinstance(attribute, Sized) and len(attribute) == number else None
            if lengths is None:
                if self.max_device_tokens is None:
                    return None
                raise ValueError(
                    f"`max_device_tokens={self.max_device_tokens}` needs the lengths of the training examples: give "
                    "`lengths=...`, one number for each example or a function of an example, or leave it out"
                )

            def read() -> Any:
                return [lengths(dataset[index]) for index in range(number)] if callable(lengths) else lengths

            self._lengths = dataset, Lengths(read, number, self.max_device_tokens)
        return self._lengths[1]

    def train_dataloader(self) -> DataLoader[Any]:
        """The training loader, with batches of ``batch_size``. It is made once, so that its workers live on."""
        if self._train_loader is None:
            rank, world_size = self._process()
            trainer = self.trainer
            sampler = GlobalBatchSampler(
                self.num_train_examples,
                self.batch_size,
                lambda: Progress(epoch=trainer.current_epoch if trainer else 0),
                seed=self.seed,
                # with `overfit_batches` the batches must be the same in every epoch
                shuffle=self.shuffle and not (trainer and trainer.overfit_batches),  # type: ignore[attr-defined]
                rank=rank,
                world_size=world_size,
                as_tensors=getattr(self.train_set, "takes_tensors", False),
                samples_per_epoch=self.samples_per_epoch,
                drop_last=self.drop_last,
            )
            # the sampler knows the lengths but does not divide by them: without BatchLRScheduler a batch is a whole step
            sampler.lengths = self.known_lengths()
            arguments = self._loader_arguments()
            loader = DataLoader(cast("Dataset[Any]", self.train_set), batch_sampler=sampler, **arguments)
            if trainer and self.max_device_tokens is not None:
                self._warn_without_scheduler(trainer)
            self._train_loader = remade(loader, sampler, arguments["generator"])
        return self._train_loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation loader; an empty list without a validation set."""
        return self._eval_dataloader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The test loader; an empty list without a test set."""
        return self._eval_dataloader(self.test_set)

    def teardown(self, stage: str) -> None:
        """Drop the loader: the next fit may have another number of processes."""
        self._train_loader = None

    def on_exception(self, exception: BaseException) -> None:
        """Drop the loader: after an exception Lightning does not call ``teardown``."""
        self._train_loader = None

    def _eval_dataloader(self, dataset: Dataset[Any] | None) -> DataLoader[Any] | list[Any]:
        if dataset is None:
            return []
        rank, world_size = self._process()
        sampler: DistributedSampler[Any] | None = (
            DistributedSampler(dataset, world_size, rank, shuffle=False) if world_size > 1 else None
        )
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._loader_arguments())

    def _loader_arguments(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "multiprocessing_context": self.multiprocessing_context if self.num_workers else None,
            "pin_memory": self.pin_memory,
            "collate_fn": self.collate_fn,
            # its own generator: a new iterator must not draw from the global one
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _warn_without_scheduler(self, trainer: Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(hasattr(callback, "batch_size_unit") for callback in callbacks):
            rank_zero_warn(
                f"`max_device_tokens={self.max_device_tokens}` has no effect without the callback BatchLRScheduler, which "
                f"splits the steps: add `BatchLRScheduler(batch_size={self.batch_size})` to the callbacks, or leave it out"
            )

    def _process(self) -> tuple[int, int]:
        return data_parallel(self.trainer) if self.trainer else (0, 1)
