"""What a grid says of the surge law: `bsl-surge-report runs/surge_cnn5` writes a page, figures and CSV files.

The folder is one that `bsl-surge-grid` has written, or is writing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from lightning_bsl.app.commands import command
from lightning_bsl.population import analyse_surge
from lightning_bsl.report import console, surge_commands, surge_summary, surge_table, write_surge_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a grid, analyse it, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the grid, which holds replicas.csv")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; `report` in the folder by default")
    parser.add_argument(
        "--target", type=float, action="append", default=[], metavar="LOSS", help="a loss to reach; repeatable; all by default"
    )
    parser.add_argument(
        "--best",
        choices=("drop", "steps"),
        default="drop",
        help="the best rate has the largest drop of the loss after the target, as in the paper, or the fewest steps to it",
    )
    options = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        parser.error("figures need matplotlib: pip install 'lightning_bsl[report]'")
    path, out = options.folder / "replicas.csv", options.out or options.folder / "report"
    if not path.is_file():
        parser.error(f"{path}: no such file; {command('bsl-surge-grid')} writes it")
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out}: not a folder")
    from lightning_bsl.population import read_outcomes  # loads torch: not for a mistyped folder

    try:
        outcomes = read_outcomes(path)
        if not outcomes:
            parser.error(f"{path}: no replica in it yet")
        known = sorted({outcome.target for outcome in outcomes})
        if unknown := sorted(set(options.target) - set(known)):
            parser.error(f"--target {unknown[0]:g}: not of this grid; it has {', '.join(f'{target:g}' for target in known)}")
        surges = analyse_surge(outcomes, options.target, by=options.best)
    except ValueError as error:
        parser.error(f"{path}: {error}")
    overrides = train_overrides(options.folder)
    train = command("bsl-train")
    files = write_surge_report(surges, out, overrides, train)

    terminal = console()
    terminal.print(surge_table(surges))
    lines = [*surge_summary(surges), f"{out}: {', '.join(file.name for file in files[:3])}, {len(files) - 3} figures"]
    settings = [f"{what}:\n{line}" for what, line in surge_commands(surges, overrides, train)]
    for line in lines + (settings or ["no settings: neither steps nor rates give a B_noise and a peak"]):
        terminal.print(line, markup=False, highlight=False, soft_wrap=True)


def train_overrides(folder: Path) -> list[str]:
    """What else ``bsl-train`` needs to train as a grid did: its data, its model and what was changed of them, and the betas.

    Args:
        folder: Of the grid. Its files are only read.

    Returns:
        The overrides; as many as are known where the files are missing or of another version.
    """
    hydra, overrides = folder / ".hydra", list[str]()
    nodes = ["data", "model", "optimizer"]
    try:
        choices = OmegaConf.select(OmegaConf.load(hydra / "hydra.yaml"), "hydra.runtime.choices") or {}
        overrides += [f"{group}={choices[group]}" for group in ("data", "model") if choices.get(group)]
        with initialize_config_module("lightning_bsl.conf", version_base="1.3"):
            default = compose("train", [*overrides, "optimizer=adam"])
        before = dict(_leaves(OmegaConf.to_container(OmegaConf.masked_copy(default, nodes))))
        grid: Any = OmegaConf.load(hydra / "config.yaml")
        after = _leaves(OmegaConf.to_container(OmegaConf.masked_copy(grid, nodes)))
        changed = {name: value for name, value in after if name != "optimizer.lr" and before.get(name, ...) != value}
        overrides += [f"++{name}={json.dumps(value)}" for name, value in changed.items()]
    except Exception:  # what is known so far
        pass
    return overrides


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration, with their dotted names."""
    if not isinstance(node, dict):
        yield path, node
        return
    for name, value in node.items():
        yield from _leaves(value, f"{path}.{name}" if path else str(name))
