"""A run's folder: whether its run is finished, and where an interrupted one goes on."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from lightning_bsl.runs.metrics import keep_metrics
from lightning_bsl.schedules.files import written_whole

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CONFIG = ".hydra/run.yaml"
BOUND = "bound.csv"  # of the full gradient norm along the plan, with columns `samples` and `bound`
LAST = "checkpoints/last.ckpt"  # from which an interrupted run goes on
FINISHED = "finished.json"  # what a run returned; there once it is finished


class Finished(NamedTuple):
    """A run that needs no more training.

    Args:
        value: What it returned.
    """

    value: float | None


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder. A process that is killed leaves no claim behind.

    On Windows nothing is claimed.

    Args:
        folder: The folder.

    Raises:
        ValueError: Another process trains in it.
    """
    if fcntl is None or getattr(rank_zero_only, "rank", 0) != 0:  # or a process of the one that has claimed it
        yield
        return
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    with open(folder / ".hydra" / "lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not `flock`, which workers that outlive a killed run would keep
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"{folder}: another process trains in this folder; wait for its end, or choose another one (hydra.run.dir=DIR)"
            ) from None
        except OSError as error:  # a file system without such locks
            rank_zero_warn(f"{folder} cannot be claimed ({error}): do not start the same command there a second time")
        yield


def open_run(cfg: DictConfig) -> Finished | str | None:
    """What the folder of a run that is about to start holds.

    A sweep that was interrupted, started again with the same ``hydra.sweep.dir``, thereby repeats no finished run and
    resumes the others from their last checkpoint. The metrics of before the interruption are kept.

    Args:
        cfg: The composed configuration; ``output_dir`` is the folder.

    Returns:
        The end of the same run, the checkpoint to resume from, or ``None`` for a start from nothing.

    Raises:
        ValueError: The folder holds a run with another configuration; the checkpoint does not exist, or none is complete.
    """
    checkpoint: str | None = cfg.ckpt_path
    # Lightning finds what is no path
    is_path = checkpoint is not None and not re.match(r"(last|best|hpc)$|registry|\w+://", checkpoint)
    if is_path and not Path(cast(str, checkpoint)).exists():
        raise ValueError(f"ckpt_path={checkpoint}: there is no such checkpoint in {Path.cwd()}; give the path of one")
    folder, first_process = Path(cfg.output_dir), getattr(rank_zero_only, "rank", 0) == 0
    if checkpoint is not None or cfg.trainer.get("fast_dev_run"):
        if checkpoint is not None and first_process and folder.resolve() in Path(checkpoint).resolve().parents:
            keep_metrics(folder / "metrics.csv")
        return checkpoint
    config, kept = _trained(cfg), folder / _CONFIG
    last = folder / LAST
    if not kept.exists() or not (last.exists() or (folder / "metrics.csv").exists()):
        if first_process:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(kept) as path:
                path.write_text(config)
        return None
    if kept.read_text() != config:
        changed = changes(kept.read_text(), config)
        raise ValueError(f"{folder} holds another run ({changed}); choose another folder, or delete this one")
    if (folder / FINISHED).exists():
        try:
            return Finished(json.loads((folder / FINISHED).read_text())["value"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / FINISHED} cannot be read ({type(error).__name__}: {error}): delete it, and the same command "
                "trains what is missing"
            ) from error
    if not last.exists():
        return None
    checkpoint = str(_complete(last))
    if first_process:
        keep_metrics(folder / "metrics.csv")
    return checkpoint


def _complete(last: Path) -> Path:
    """The last checkpoint; or if it was cut short, as by a full disk, the newest one before it."""
    others = sorted(set(last.parent.glob("*.ckpt")) - {last}, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in (last, *others):
        if path.is_dir() or zipfile.is_zipfile(path):  # its table of contents stands at its end
            if path != last:
                rank_zero_warn(f"{last} is not complete, so the run goes on from {path.name}")
            return path
    raise ValueError(f"{last} is not complete, and there is no other checkpoint: delete it to start the run anew")


def changes(before: str, after: str) -> str:
    """The first lines in which two configurations differ.

    Args:
        before: One, as YAML.
        after: The other.
    """
    differing = set(before.splitlines()) ^ set(after.splitlines())
    return ", ".join(line.strip() for line in sorted(differing)[:6])


def finish_run(cfg: DictConfig, value: float | None) -> None:
    """Note that a run is finished.

    Args:
        cfg: The composed configuration.
        value: What the run returns.
    """
    if cfg.trainer.get("fast_dev_run"):
        return
    folder = Path(cfg.output_dir)
    if (folder / _CONFIG).exists() and (folder / _CONFIG).read_text() == _trained(cfg):
        with written_whole(folder / FINISHED) as path:
            path.write_text(json.dumps({"value": value}))


def write_bound(folder: Path, bounds: Sequence[tuple[float, float]]) -> None:
    """Leave the bound of a run beside its plan, for whoever compares it with the measured gradient norm.

    Args:
        folder: The run's folder.
        bounds: Pairs of samples and the bound on the full gradient norm there.
    """
    with written_whole(folder / BOUND) as path, open(path, "w", newline="") as file:
        csv.writer(file).writerows([("samples", "bound"), *bounds])


def _trained(cfg: DictConfig) -> str:
    """The configuration but for what does not change the training, as YAML."""
    config = cast("dict[str, Any]", OmegaConf.to_container(cfg))
    for name in ("ckpt_path", "logger"):
        config.pop(name, None)
    for node, names in (("data", ("root", "download", "num_workers")), ("trainer", ("accelerator", "devices", "strategy"))):
        for name in (*names, *(key for key in config[node] if key.startswith("enable_"))):
            config[node].pop(name, None)
    return OmegaConf.to_yaml(OmegaConf.create(config))
