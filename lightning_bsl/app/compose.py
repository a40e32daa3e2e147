"""From a composed Hydra configuration (``conf/``) to the objects of a run."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra.errors import CompactHydraException
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import DataLoader

from lightning_bsl.callbacks import AdaptiveBatchLRScheduler, BatchLRScheduler, plan_fit
from lightning_bsl.data import BatchSizeDataModule
from lightning_bsl.data.sampler import GlobalBatchSampler
from lightning_bsl.report import console
from lightning_bsl.schedules import Plan
from lightning_bsl.schedules.plan import Measure
from lightning_bsl.theory import BoundConstants

CONF = "pkg://lightning_bsl.conf"  # where the commands find their configuration
Result = TypeVar("Result")


def in_short(task: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result]:
    """Let a command print what it refuses as a message, without a traceback; ``HYDRA_FULL_ERROR=1`` shows it.

    What fails elsewhere, such as in a user's model, keeps its traceback.

    Args:
        task: The function that ``hydra.main`` runs.
    """

    @wraps(task)
    def run(cfg: DictConfig) -> Result:
        try:
            return task(cfg)
        except (ValueError, TypeError, RuntimeError, OSError, ImportError, OmegaConfBaseException) as error:
            if not _is_refusal(error):
                raise
            # Hydra would print an error of the configuration a second time
            raise CompactHydraException(str(error)) from None if isinstance(error, OmegaConfBaseException) else error

    return run


def _is_refusal(error: Exception) -> bool:
    """Whether the settings are refused: by this package, by the configuration, or by the Trainer."""
    if isinstance(error, (OmegaConfBaseException, MisconfigurationException)):
        return True
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return str(last.f_globals.get("__name__")).startswith("lightning_bsl.")


def make_plan(cfg: DictConfig, scheduler: BatchLRScheduler, datamodule: LightningDataModule) -> Plan | None:
    """The plan of the run that ``cfg`` describes; ``None`` for a run without an end, or with ``fast_dev_run``.

    What a measurement decides has no plan before the run; after it, the plan says what happened.

    Args:
        cfg: The composed configuration; ``trainer`` gives the horizon.
        scheduler: The scheduler of the run.
        datamodule: Its data. Not loaded if they are a `BatchSizeDataModule` that knows its size.

    Raises:
        ValueError: A schedule that cannot be run on these data, or over this horizon.
    """
    trainer = cfg.trainer
    if trainer.get("fast_dev_run") or (isinstance(scheduler, AdaptiveBatchLRScheduler) and not scheduler.progress.step):
        return None
    if scheduler.whole_batches:
        if scheduler.progress.step:
            return None
        raise ValueError(
            f"`scheduler.whole_batches={scheduler.whole_batches}`: the plan follows from the batches of the loader, which are "
            "drawn when the training begins; leave it out to plan without"
        )
    tokens_per_sample = getattr(datamodule, "tokens_per_sample", None)
    return plan_fit(
        scheduler.schedule,
        _num_epoch_examples(datamodule),
        trainer.get("max_epochs"),
        trainer.get("max_steps", -1),
        trainer.get("overfit_batches") or trainer.get("limit_train_batches"),  # as Lightning has it
        max_samples=scheduler.budget.samples(tokens_per_sample),
        tokens_per_sample=tokens_per_sample,
        drop_last=getattr(datamodule, "drop_last", False),
        measure=_tokens(datamodule) if scheduler.batch_size_unit == "tokens" else None,
    )


def make_constants(cfg: DictConfig) -> BoundConstants | None:
    """The constants of the problem that the bound of Umeda & Iiduka 2025 (arXiv 2409.08770) needs; ``None`` if not given.

    Args:
        cfg: The composed configuration; ``constants`` gives them.

    Raises:
        ValueError: Some of them are given and others are not, or one is out of its range.
    """
    constants = cfg.get("constants")
    if not constants or all(value is None for name, value in constants.items() if name != "_target_"):
        return None
    if missing := [name for name, value in constants.items() if value is None]:
        raise ValueError(f"the bound needs all of `constants`; give {', '.join(f'constants.{name}' for name in missing)} too")
    return cast(BoundConstants, instantiate(constants))


def draw(path: Path, plot: Callable[[Path], Any]) -> None:
    """Draw a figure, or say why there is none: matplotlib may be missing.

    Args:
        path: The file.
        plot: Draws it.
    """
    try:
        plot(path)
    except ModuleNotFoundError as error:
        console().print(f"no {path.name}: {error}", markup=False, soft_wrap=True)


def list_files(folder: Path, *files: str) -> None:
    """Print which files a command has left in a folder.

    Args:
        folder: The folder.
        files: Those that it may have left.
    """
    if written := [file for file in files if (folder / file).exists()]:
        console().print(f"{folder}: {', '.join(written)}", soft_wrap=True)


@contextmanager
def known_warnings() -> Iterator[None]:
    """For a while, say nothing of what is known and meant."""
    with warnings.catch_warnings():
        # the run's folder holds more than metrics, and late stages have few, large batches
        warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
        warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.* is deprecated")  # Lightning's own
        warnings.filterwarnings("ignore", ".*does not have many workers which may be a bottleneck")
        warnings.filterwarnings("ignore", "You passed in a `val_dataloader` but have no `validation_step`")
        yield


def make_trainer(cfg: DictConfig, *first: Callback) -> Trainer:
    """The Trainer of the run, with its loggers and callbacks.

    Args:
        cfg: The composed configuration.
        first: Callbacks in front of those that ``callbacks`` names.
    """
    # `~callbacks` and `~logger` leave no such node; what an experiment says of a callback that is not chosen is no callback
    chosen = [callback for callback in (cfg.get("callbacks") or {}).values() if callback and "_target_" in callback]
    callbacks = [*first, *map(instantiate, chosen)]
    loggers = list(instantiate(cfg.get("logger") or {}).values())
    return cast(Trainer, instantiate(trainer_node(cfg), callbacks=callbacks, logger=loggers or False))


def trainer_node(cfg: DictConfig) -> DictConfig:
    """The node ``trainer`` without the ends in samples and tokens, which the scheduler reads there and no Trainer knows.

    Args:
        cfg: The composed configuration.
    """
    cfg = copy.deepcopy(cfg)  # the whole of it, since the node may refer to other nodes
    with open_dict(cfg):
        for name in ("max_samples", "max_tokens"):
            cfg.trainer.pop(name, None)
    return cast(DictConfig, cfg.trainer)


def _tokens(datamodule: LightningDataModule) -> Measure | None:
    """What batch sizes in tokens count."""
    if isinstance(datamodule, BatchSizeDataModule):
        if datamodule.train_set is None:
            datamodule.prepare_data()
            datamodule.setup("fit")
        sampler = cast(GlobalBatchSampler, datamodule.train_dataloader().batch_sampler)
        datamodule.teardown("fit")  # the fit makes a loader of its own
        if sampler.lengths is not None:
            sampler.in_tokens = True
            return sampler.measure
    raise ValueError(
        "`batch_size_unit='tokens'` needs the length of each training example: write `data.pack=false` for text, or "
        "`lengths=...` for a BatchSizeDataModule"
    )


def _num_epoch_examples(datamodule: LightningDataModule) -> int:
    if isinstance(datamodule, BatchSizeDataModule):
        try:
            return datamodule.num_epoch_examples
        except ValueError:  # the sets are made in `setup`
            datamodule.prepare_data()
            datamodule.setup("fit")
            return datamodule.num_epoch_examples
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader: DataLoader[Any] = datamodule.train_dataloader()
    return len(cast(Sized, loader.dataset))
