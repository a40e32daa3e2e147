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


def data_parallel(trainer: Trainer) -> tuple[int, int]:
    """This process's index among those that share a batch, and their number.

    These are all processes, unless some hold parts of one model and train on the same examples (tensor parallelism).
    """
    arguments = trainer.distributed_sampler_kwargs
    return (arguments["rank"], arguments["num_replicas"]) if arguments else (0, 1)


def to_precision(datamodule: LightningDataModule, batch: Any) -> Any:
    """What a DataModule computed on the device, in the Trainer's precision: Lightning converts only what the loader gives.

    Args:
        datamodule: The DataModule; without a Trainer nothing is converted.
        batch: The batch, or a part of it.
    """
    plugin = getattr(datamodule.trainer, "precision_plugin", None)
    return batch if plugin is None else plugin.convert_input(batch)


class BatchSizeDataModule(LightningDataModule):
    """Any map-style data sets, in batches whose size a schedule decides.

    With [`BatchLRScheduler`][lightning_bsl.BatchLRScheduler] among the callbacks the batch size follows its schedule,
    inside an epoch too; without it, it is ``batch_size`` throughout. The batch size is global: the examples of one
    optimizer step over all processes.

    Args:
        train: Training set. Subclasses may set ``train_set``, ``val_set`` and ``test_set`` in ``setup`` instead.
        val: Validation set.
        test: Test set.
        batch_size: Global batch size where no schedule says otherwise.
        eval_batch_size: Batch size for validation and test, of one process.
        num_workers: Worker processes of each loader; they live as long as the loader.
        multiprocessing_context: How they are started: ``"fork"``, ``"forkserver"`` or ``"spawn"``; the platform's way by
            default. Over several processes on CPUs (gloo) a forked worker now and then hangs: write ``"forkserver"``.
        pin_memory: Whether to copy batches to pinned memory; by default where CUDA is available.
        collate_fn: As of ``torch.utils.data.DataLoader``.
        seed: Seed of the order of the training examples.
        shuffle: Whether to shuffle the training examples.
        samples_per_epoch: Only that many random training examples an epoch; all by default.
        drop_last: Whether to leave out a last step of an epoch that has fewer examples than the batch size.
        lengths: The length of each training example, 1 or more: a sequence, an array or a tensor; or a function of an example,
            called once for each when the lengths are first needed. By default the training set's attribute ``lengths``, if it
            has one. ``BatchLRScheduler`` then deals the examples of each step to the processes, and cuts them into
            micro-batches, so that examples of similar length are padded together; which examples a step has stays the same.
            (``GradientNoiseScale`` then sees the differences between short and long examples as noise, too.)
        max_device_tokens: Beside ``BatchLRScheduler``, most padded tokens that one process puts through the model at once: the
            longest example of a micro-batch x its examples. Needs the lengths.

    Raises:
        TypeError: A training set without a length (an ``IterableDataset``), or lengths that are no numbers.
        ValueError: A size below 1; ``max_device_tokens`` without lengths, or below the longest of them; more or fewer lengths
            than training examples, or one below 1.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> datamodule = BatchSizeDataModule(TensorDataset(torch.arange(10)), batch_size=4)
        >>> len(datamodule.train_dataloader())
        3
    """

    tokens_per_sample: int | None = None  # of data sets of sequences, all of one length: for schedules in tokens

    def __init__(
        self,
        # not `Dataset[Any]`: LightningCLI gives no arguments to a data set whose type is written so
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
        # not its types: LightningCLI does not know arrays
        lengths: Any = None,
        max_device_tokens: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"`{name}={value}` must be 1 or more")
        if samples_per_epoch is not None and samples_per_epoch < 1:
            raise ValueError(f"`samples_per_epoch={samples_per_epoch}` must be 1 or more")
        if max_device_tokens is not None and not max_device_tokens >= 1:
            raise ValueError(f"`max_device_tokens={max_device_tokens}` must be 1 or more, or None for no bound")
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
        self._lengths: tuple[Any, Lengths] | None = None  # of which training set, and what they are
        self._train_loader: DataLoader[Any] | None = None

    @property
    def num_train_examples(self) -> int:
        """Examples of the training set."""
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
        """Training examples of one epoch."""
        number, most = self.samples_per_epoch, self.num_train_examples
        if number is not None and number > most:
            raise ValueError(f"`samples_per_epoch={number}` must be at most the {most} examples of the training set")
        return number or most

    def known_lengths(self) -> Lengths | None:
        """The lengths of the training examples, and their bound; ``None`` where they are not known.

        Raises:
            ValueError: ``max_device_tokens`` without lengths.
        """
        dataset: Any = self.train_set
        given, number = self.lengths, self.num_train_examples
        if self._lengths is None or self._lengths[0] is not dataset:
            if given is None:
                attribute = getattr(dataset, "lengths", None)
                # else it means something else
                given = attribute if isinstance(attribute, Sized) and len(attribute) == number else None
            if given is None:
                if self.max_device_tokens is None:
                    return None
                raise ValueError(
                    f"`max_device_tokens={self.max_device_tokens}` needs the lengths of the training examples: give "
                    "`lengths=...`, one number for each example or a function of an example, or leave it out"
                )

            def read() -> Any:
                return [given(dataset[index]) for index in range(number)] if callable(given) else given

            self._lengths = dataset, Lengths(read, number, self.max_device_tokens)
        return self._lengths[1]

    def train_dataloader(self) -> DataLoader[Any]:
        """The training loader: the same object every time, so that workers live on; its batches are of ``batch_size``."""
        if self._train_loader is None:
            rank, world_size = self._process()
            trainer = self.trainer
            sampler = GlobalBatchSampler(
                self.num_train_examples,
                self.batch_size,
                lambda: Progress(epoch=trainer.current_epoch if trainer else 0),
                seed=self.seed,
                # to overfit a few batches they must be the same ones in every epoch
                shuffle=self.shuffle and not (trainer and trainer.overfit_batches),  # type: ignore[attr-defined]
                rank=rank,
                world_size=world_size,
                as_tensors=getattr(self.train_set, "takes_tensors", False),
                samples_per_epoch=self.samples_per_epoch,
                drop_last=self.drop_last,
            )
            # known, but not cut by: without BatchLRScheduler each batch of the loader is a whole step
            sampler.lengths = self.known_lengths()
            arguments = self._loader_arguments()
            loader = DataLoader(cast("Dataset[Any]", self.train_set), batch_sampler=sampler, **arguments)
            if trainer and self.max_device_tokens is not None:
                self._warn_without_scheduler(trainer)
            self._train_loader = remade(loader, sampler, arguments["generator"])
        return self._train_loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation loader; none without a validation set."""
        return self._eval_dataloader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The test loader; none without a test set."""
        return self._eval_dataloader(self.test_set)

    def teardown(self, stage: str) -> None:
        """Forget the loader: the next fit may have other processes."""
        self._train_loader = None

    def on_exception(self, exception: BaseException) -> None:
        """Forget the loader: Lightning does not call ``teardown`` then."""
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
            # of its own: making a loader's iterator must not draw from the global one
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _warn_without_scheduler(self, trainer: Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(hasattr(callback, "batch_size_unit") for callback in callbacks):
            rank_zero_warn(
                f"`max_device_tokens={self.max_device_tokens}` does nothing without BatchLRScheduler among the callbacks, "
                f"which cuts the steps: add `BatchLRScheduler(batch_size={self.batch_size})`"
            )

    def _process(self) -> tuple[int, int]:
        return data_parallel(self.trainer) if self.trainer else (0, 1)
