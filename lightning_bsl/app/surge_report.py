"""What a grid says of the surge law: `bsl-surge-report runs/cnn5` writes a page, figures and CSV files.

The folder is one that `bsl-surge-grid` has written, or is writing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_bsl.app.commands import command
from lightning_bsl.population import analyse_surge
from lightning_bsl.report import console, surge_commands, surge_summary, surge_table, train_overrides, write_surge_report


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
    given = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        parser.error("figures need matplotlib: pip install 'lightning_bsl[report]'")
    path, out = given.folder / "replicas.csv", given.out or given.folder / "report"
    if not path.is_file():
        parser.error(f"{path}: no such file; {command('bsl-surge-grid')} writes it")
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out}: not a folder")
    from lightning_bsl.population import read_outcomes  # loads torch: not for a mistyped folder

    try:
        outcomes = read_outcomes(path)
        if not outcomes:
            parser.error(f"{path}: no replica in it yet")
        known = sorted({each.target for each in outcomes})
        if unknown := sorted(set(given.target) - set(known)):
            parser.error(f"--target {unknown[0]:g}: not of this grid; it has {', '.join(f'{each:g}' for each in known)}")
        surges = analyse_surge(outcomes, given.target, by=given.best)
    except ValueError as error:
        parser.error(f"{path}: {error}")
    overrides = train_overrides(given.folder)
    files = write_surge_report(surges, out, overrides)

    terminal = console()
    terminal.print(surge_table(surges))
    said = surge_summary(surges)
    commands = surge_commands(surges, overrides)
    said.append(f"{out}: {', '.join(file.name for file in files[:3])}, {len(files) - 3} figures")
    said += [f"{what}:\n{command}" for what, command in commands]
    said += [] if commands else ["no settings: neither steps nor rates give a B_noise and a peak"]
    for each in said:
        terminal.print(each, markup=False, highlight=False, soft_wrap=True)
