"""The lengths of the examples, and whether steps are divided by length or counted in tokens."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.data.lengths import Lengths
from lightning_bsl.data.sampler import Cut, GlobalBatchSampler, Permutation


def lengths_of(datamodule: Any, loader: DataLoader[Any]) -> Lengths | None:
    """The lengths of the scheduled loader's examples, from its sampler or from the DataModule; ``None`` if not known.

    Args:
        datamodule: The DataModule of the Trainer, if there is one.
        loader: The scheduled loader.

    Raises:
        MisconfigurationException: The DataModule has lengths, but its loader is over another data set.
    """
    if isinstance(loader.batch_sampler, GlobalBatchSampler):
        return loader.batch_sampler.lengths
    if not isinstance(datamodule, BatchSizeDataModule) or (datamodule.lengths is None and datamodule.max_device_tokens is None):
        return None
    if loader.dataset is datamodule.train_set:
        return datamodule.known_lengths()
    raise MisconfigurationException(
        "`lengths` are those of the DataModule's `train_set`, but its `train_dataloader` gives a loader over another data "
        "set: give the data set as `train`, or set it as `train_set` in `setup`; or leave `lengths` out"
    )


def cuts_by_length(lengths: Lengths | None, order: Any, cut: Cut, whole: bool) -> bool:
    """Whether steps are divided by length.

    Args:
        lengths: Lengths of the examples, if they are known.
        order: The order of the examples.
        cut: How steps are divided otherwise.
        whole: Whether the loader gives whole steps (``max_device_batch_size="auto"``).

    Raises:
        MisconfigurationException: ``max_device_tokens`` in a fit whose steps cannot be divided by it.
        ValueError: Lengths that are not valid.
    """
    if lengths is None:
        return False
    tokens, ahead = lengths.max_device_tokens, isinstance(order, Permutation)
    if ahead and (whole or tokens or cut.max_device_batch_size or cut.world_size > 1):
        _ = lengths.values  # read them now, so that errors come before training
    if tokens is None:
        return ahead and not whole and cut.accumulate == 1
    bound = f"`max_device_tokens={tokens}`"
    if whole:
        raise MisconfigurationException(
            f"{bound} and `max_device_batch_size='auto'` both limit a micro-batch: leave out `max_device_tokens` to find the "
            "limit automatically, or `max_device_batch_size` to use your limit"
        )
    if cut.accumulate > 1:
        raise MisconfigurationException(
            f"`accumulate_grad_batches={cut.accumulate}` and {bound} both split a step. Write `accumulate_grad_batches=1`"
        )
    if not ahead:
        raise MisconfigurationException(
            f"the training loader has a sampler of its own, so the order of the examples is not known before the run, and "
            f"{bound} cannot be planned: use `shuffle` in place of the sampler, or leave `max_device_tokens` out"
        )
    return True


def check_tokens(lengths: Lengths | None, order: Any, cut: Cut, loaders: int) -> None:
    """Refuse batch sizes in tokens if the examples of each step are not known before the run.

    Args:
        lengths: Lengths of the examples, if they are known.
        order: The order of the examples.
        cut: How steps are divided.
        loaders: Number of training loaders.

    Raises:
        MisconfigurationException: The examples of each step are not known before the run.
        ValueError: Lengths that are not valid.
    """
    remedy = 'or leave out `batch_size_unit="tokens"` and write batch sizes in examples'
    if lengths is None:
        raise MisconfigurationException(
            '`batch_size_unit="tokens"` needs the length of each training example: give '
            f"`BatchSizeDataModule(lengths=...)`, or a data set with an attribute `lengths` in one; {remedy}"
        )
    if loaders > 1:
        raise MisconfigurationException(
            f'`batch_size_unit="tokens"` with {loaders} training loaders: the number of steps of an epoch is not known before '
            f"the run. Give one loader, {remedy}"
        )
    if not isinstance(order, Permutation):
        raise MisconfigurationException(
            "the training loader has a sampler of its own, so the order of the examples is not known before the run: use "
            f"`shuffle` in place of the sampler, {remedy}"
        )
    if cut.accumulate > 1:
        raise MisconfigurationException(
            f'`accumulate_grad_batches={cut.accumulate}` with `batch_size_unit="tokens"`: the batch size is already '
            "that of a whole step. Write `accumulate_grad_batches=1`"
        )
    _ = lengths.values  # read them now, so that errors come before training
