"""The folder of a run that is refused: nothing of it stays, unless something was there before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_bsl.runs.folder import claimed

OF_HYDRA = ("config.yaml", "hydra.yaml", "overrides.yaml")  # what it writes before it calls a command
OF_RUN = (*OF_HYDRA, "lock", "run.yaml", "grid.yaml")  # in `.hydra`
BESIDE = ("plan.csv", "bound.csv", "hparams.yaml")
REPLICAS = "replicas.csv"  # of a grid


class NewFolder(NamedTuple):
    """A folder in which there is nothing yet but what Hydra has written for this run.

    Args:
        path: The folder.
        overrides: What Hydra has written of this run; ``None`` where it wrote nothing.
        log: The name of its log file.
    """

    path: Path
    overrides: str | None
    log: str


def new_folders(cfg: DictConfig) -> list[NewFolder]:
    """The folders of the run that is about to start, as far as they are new.

    Args:
        cfg: The composed configuration.
    """
    if not HydraConfig.initialized() or getattr(rank_zero_only, "rank", 0) != 0:
        return []
    hydra, found = HydraConfig.get(), []
    paths = [Path(hydra.runtime.output_dir)]
    with suppress(OmegaConfBaseException, TypeError):
        paths.append(Path(cfg.output_dir))
    for path in dict.fromkeys(path.resolve() for path in paths):
        log = f"{hydra.job.name}.log"
        new = _files(path) <= {log, *(f".hydra/{name}" for name in OF_HYDRA)}
        if new and path != Path(hydra.runtime.cwd).resolve():
            found.append(NewFolder(path, _overrides(path), log))
    return found


def forget(folders: list[NewFolder]) -> None:
    """Remove folders of a run that was refused.

    A folder stays as it is where it holds something that such a run does not write, and where another process has claimed it,
    or has started in it since.

    Args:
        folders: Those that were new when the run started.
    """
    for folder in folders:
        known = {folder.log, *BESIDE, *(f".hydra/{name}" for name in OF_RUN)}
        with suppress(OSError, ValueError):  # it is claimed, or something appears in it
            if _is_header(folder.path / REPLICAS):
                known.add(REPLICAS)
            if _overrides(folder.path) != folder.overrides or not _files(folder.path) <= known or not folder.path.is_dir():
                continue
            with claimed(folder.path):
                for name in known:
                    (folder.path / name).unlink(missing_ok=True)
                for path in (folder.path / ".hydra", folder.path):
                    path.rmdir()


def _files(folder: Path) -> set[str]:
    """What a folder holds: its files, and its empty folders but for ``.hydra``."""
    return set(_inside(folder, folder)) if folder.is_dir() else set()


def _inside(folder: Path, root: Path) -> Iterator[str]:
    for entry in os.scandir(folder):
        name = str(Path(entry.path).relative_to(root))
        if entry.is_dir(follow_symlinks=False):
            yield from [name] if name != ".hydra" else _inside(Path(entry.path), root)
        else:
            yield name


def _is_header(path: Path) -> bool:
    """Whether a table has no rows yet."""
    return path.is_file() and len(path.read_bytes().splitlines()) <= 1


def _overrides(folder: Path) -> str | None:
    with suppress(OSError):
        return (folder / ".hydra" / "overrides.yaml").read_text()
    return None
