"""Whether the lengths of examples are known, and what of a step goes by them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.data.lengths import Lengths
from lightning_bsl.data.sampler import Cut, GlobalBatchSampler, Permutation


def lengths_of(datamodule: Any, loader: DataLoader[Any]) -> Lengths | None:
    """The lengths of the scheduled loader's examples: its sampler has them, or the DataModule that it is of.

    Args:
        datamodule: Of the Trainer, if there is one.
        loader: The loader.

    Raises:
        MisconfigurationException: The DataModule has lengths, and its loader is over another data set.
    """
    if isinstance(loader.batch_sampler, GlobalBatchSampler):
        return loader.batch_sampler.lengths
    own = datamodule if isinstance(datamodule, BatchSizeDataModule) else None
    if own is None or (own.lengths is None and own.max_device_tokens is None):
        return None
    if loader.dataset is own.train_set:
        return own.known_lengths()
    raise MisconfigurationException(
        "`lengths` are those of the DataModule's `train_set`, but its `train_dataloader` gives a loader over another data "
        "set: give the data set as `train`, or set it as `train_set` in `setup`; or leave `lengths` out"
    )


def cuts_by_length(lengths: Lengths | None, order: Any, cut: Cut, whole: bool) -> bool:
    """Whether steps are dealt and cut by length.

    Args:
        lengths: Of the examples, where they are known.
        order: The order of the examples.
        cut: How steps are cut else.
        whole: Whether the loader gives whole steps.

    Raises:
        MisconfigurationException: ``max_device_tokens`` where steps cannot be cut by it.
        ValueError: Lengths that cannot be.
    """
    if lengths is None:
        return False
    tokens, ahead = lengths.max_device_tokens, isinstance(order, Permutation)
    if ahead and (whole or tokens or cut.max_device_batch_size or cut.world_size > 1):
        _ = lengths.values  # the errors of lengths that are needed come now
    if tokens is None:
        return ahead and not whole and cut.accumulate == 1
    bound = f"`max_device_tokens={tokens}`"
    if whole:
        raise MisconfigurationException(
            f"{bound} and `max_device_batch_size='auto'` both say how much of a step goes through the model at once: leave "
            "`max_device_tokens` out to have it found, or `max_device_batch_size` to have it as you say"
        )
    if cut.accumulate > 1:
        raise MisconfigurationException(
            f"`accumulate_grad_batches={cut.accumulate}` and {bound} both say how a step is cut. Write "
            "`accumulate_grad_batches=1`"
        )
    if not ahead:
        raise MisconfigurationException(
            f"the training loader has a sampler of its own, so it is not known ahead which examples {bound} puts together: "
            "use `shuffle` in the place of the sampler, or leave `max_device_tokens` out"
        )
    return True


def check_tokens(lengths: Lengths | None, order: Any, cut: Cut, loaders: int) -> None:
    """Refuse batch sizes in tokens where it is not known ahead how many examples they are.

    Args:
        lengths: Of the examples, where they are known.
        order: The order of the examples.
        cut: How steps are cut.
        loaders: Training loaders.

    Raises:
        MisconfigurationException: It is not known.
        ValueError: Lengths that cannot be.
    """
    remedy = 'or leave out `batch_size_unit="tokens"` and write batch sizes in examples'
    if lengths is None:
        raise MisconfigurationException(
            '`batch_size_unit="tokens"` needs the length of each training example: give '
            f"`BatchSizeDataModule(lengths=...)`, or a data set with an attribute `lengths` in one; {remedy}"
        )
    if loaders > 1:
        raise MisconfigurationException(
            f'`batch_size_unit="tokens"` with {loaders} training loaders: how many steps an epoch has is not known ahead. '
            f"Give one loader, {remedy}"
        )
    if not isinstance(order, Permutation):
        raise MisconfigurationException(
            "the training loader has a sampler of its own, so it is not known ahead how many tokens each step has: use "
            f"`shuffle` in the place of the sampler, {remedy}"
        )
    if cut.accumulate > 1:
        raise MisconfigurationException(
            f'`accumulate_grad_batches={cut.accumulate}` with `batch_size_unit="tokens"`: the batch size is already '
            "that of a whole step. Write `accumulate_grad_batches=1`"
        )
    _ = lengths.values  # their errors come now
