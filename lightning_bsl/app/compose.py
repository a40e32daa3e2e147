"""From a composed Hydra configuration (``conf/``) to the objects of a run."""

from __future__ import annotations

import copy
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from torch.utils.data import DataLoader

from lightning_bsl.app.arguments import check_settings
from lightning_bsl.app.refused import forget, new_folders
from lightning_bsl.callbacks import AdaptiveBatchLRScheduler, BatchLRScheduler, plan_fit
from lightning_bsl.data import BatchSizeDataModule
from lightning_bsl.data.sampler import GlobalBatchSampler
from lightning_bsl.report import console
from lightning_bsl.schedules import Plan
from lightning_bsl.schedules.files import written_whole
from lightning_bsl.schedules.plan import Measure
from lightning_bsl.theory import BoundConstants

CONF = "pkg://lightning_bsl.conf"  # where the commands find their configuration
Result = TypeVar("Result")
REFUSALS = (ValueError, TypeError, RuntimeError, OSError, ImportError)  # what this package raises where it refuses
LIBRARIES = sys.stdlib_module_names | {
    *("lightning_bsl", "lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "torch", "torchmetrics"),
    *("torchvision", "hydra", "omegaconf", "numpy", "scipy", "sklearn", "pandas", "PIL", "fsspec", "transformers", "datasets"),
    *("tokenizers", "huggingface_hub", "optuna", "sqlalchemy", "tensorboard", "wandb", "rich", "matplotlib"),
}


def in_short(task: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result]:
    """Let a command print what it refuses as a message, without a traceback; ``HYDRA_FULL_ERROR=1`` shows it.

    The values of the configuration are checked first. A run that is refused before its first step leaves no folder behind,
    unless something was in the folder before. What fails elsewhere, such as in a user's model, keeps its traceback.

    Args:
        task: The function that ``hydra.main`` runs.
    """

    @wraps(task)
    def run(cfg: DictConfig) -> Result:
        folders = new_folders(cfg)
        try:
            check_settings(cfg)
            return task(cfg)
        except Exception as error:
            begun = _has_begun(error)
            message = _refusal(error, cfg, begun)
            if message is None:
                raise
            if not begun:
                forget(folders)
            # Hydra would print an error of the configuration a second time
            raise CompactHydraException(message) from None if isinstance(error, OmegaConfBaseException) else error

    return run


def _refusal(error: Exception, cfg: DictConfig, begun: bool) -> str | None:
    """What to print where settings are refused: by this package, by the configuration, or by a library before the first step.

    ``None`` where something else fails.
    """
    if isinstance(error, InstantiationException):
        cause = error.__cause__
        if cause is None or isinstance(cause, OmegaConfBaseException):
            return str(error)
        called = re.search(r"target '(?:[\w.]*\.)?(\w+)'", str(error))
        key = re.search(r"full_key: (\S+)", str(error))
        node = _node(cfg, key and key[1], called and called[1])
        if _raised_by(cause) == "lightning_bsl" and isinstance(cause, REFUSALS):
            return _with_keys(f"`{node[0]}`: {cause}" if node else str(cause), cfg)
        if node is None or not _of_libraries(cause):
            return str(error)
        return f"`{node[0]}`: {_said(cause)}; change {_settings(str(cause), node[1], node[0])}"
    if isinstance(error, OmegaConfBaseException):
        return _of_configuration(error, cfg)
    if isinstance(error, MisconfigurationException) or (isinstance(error, REFUSALS) and _raised_by(error) == "lightning_bsl"):
        return _with_keys(str(error), cfg)
    if begun or not _of_libraries(error) or _raised_by(error) == "lightning_bsl":
        return None
    return f"{_said(error)}; change {_settings(str(error), cfg, '')}"


def _of_configuration(error: OmegaConfBaseException, cfg: DictConfig) -> str:
    """What the configuration says of itself, and what to write."""
    text, key = str(error), error.full_key
    if isinstance(error, MissingMandatoryValue) and key:
        return f"`{key}` has no value (???): give it one, {key}=VALUE"
    if isinstance(error, InterpolationResolutionError):
        absent = re.search(r"key '([^']+)' not found", text)
        if not key and absent:
            key = next((name for name, raw in _raw(OmegaConf.to_container(cfg)) if f"{absent[1]}" in str(raw)), None)
        where = f"`{key}`: " if key else ""
        return f"{where}{text.splitlines()[0]}: write the name of a value that there is, or the value itself"
    return text


def _raw(node: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """The values of nested dicts and lists, with their dotted names."""
    if not isinstance(node, (dict, list)):
        yield path, node
        return
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _raw(value, f"{path}.{name}" if path else str(name))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _raised_by(error: BaseException) -> str:
    """The package whose code raised an error."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return str(last.f_globals.get("__name__")).partition(".")[0]


def _of_libraries(error: BaseException) -> bool:
    """Whether no code of the user took part."""
    packages = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)}
    return packages <= LIBRARIES


def _has_begun(error: BaseException) -> bool:
    """Whether a fit had come to its first step."""
    loop = "lightning.pytorch.loops.training_epoch_loop"
    return any(
        frame.f_code.co_name == "advance" and frame.f_globals.get("__name__") == loop
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _node(cfg: DictConfig, key: str | None, called: str | None) -> tuple[str, DictConfig] | None:
    """A node and its name: by this name, or by what it calls."""
    if key is not None and isinstance(node := OmegaConf.select(cfg, key), DictConfig):
        return key, node
    for name, child in cfg.items_ex(resolve=False):
        is_node = isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation()
        if is_node and called and str(child.get("_target_")).rpartition(".")[2] == called:
            return str(name), child
    return None


def _settings(text: str, node: DictConfig, path: str) -> str:
    """The settings of a node that a message names; all of them where it names none."""
    found = {key: value for key, value, _ in _written(node, path)}
    said = set(re.findall(r"\w+", text))
    named = [key for key in found if key.rpartition(".")[2] in said]
    named = named or [
        key
        for key, value in found.items()
        if len(str(value)) > 1 and re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.])", text)
    ]
    if not named and not path and HydraConfig.initialized():
        return " ".join(HydraConfig.get().overrides.task) or "the configuration"
    return " or ".join(f"`{key}={found[key]!r}`" for key in named or found)


def _with_keys(text: str, cfg: DictConfig) -> str:
    """A message about arguments, with the names under which the configuration has them."""
    given = set(re.findall(r"(\w+)=(-?[\w.+-]+|'[^']*')", text))
    others = [(key, value, written) for key, value, written in _written(cfg) if key not in text]
    found = [other for other in others if (other[0].rpartition(".")[2], repr(other[1])) in given]
    if not found and not re.search(r"`\w+(\.\w+)+[=`]", text):  # a value alone, such as a path
        texts = [other for other in others if isinstance(other[1], str) and len(other[1]) > 2]
        found = [other for other in texts if re.search(rf"(?<!\w){re.escape(str(other[1]))}(?!\w)", text)]
    keys = [f"`{key}`, which is {written}" if written else f"`{key}`" for key, _, written in found]
    return f"{text} ({', '.join(keys)})" if 0 < len(keys) < 4 else text


def _written(node: Any, path: str = "") -> Iterator[tuple[str, object, str | None]]:
    """The values of a node with their dotted names, and how those are written that are taken from elsewhere."""
    names: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        try:
            value, raw = node[name], node._get_node(name)
        except OmegaConfBaseException:
            continue
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, (DictConfig, ListConfig)):
            if raw is not None and not raw._is_interpolation():
                yield from _written(value, key)
        elif not str(name).startswith("_"):
            yield key, value, raw._value() if raw._is_interpolation() else None


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
        given = ", ".join(f"constants.{name}={constants[name]}" for name in constants if name not in (*missing, "_target_"))
        absent = ", ".join(f"constants.{name}" for name in missing)
        raise ValueError(f"the bound needs all of `constants`; give {absent} too, beside {given}")
    return cast(BoundConstants, instantiate(constants))


def draw(path: Path, plot: Callable[[Path], Any]) -> None:
    """Draw a figure, which a full disk leaves as it was, or say why there is none: matplotlib may be missing.

    Args:
        path: The file.
        plot: Draws it.
    """
    try:
        with written_whole(path) as unfinished:
            plot(unfinished)
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
