"""Compare runs: `bsl-report multirun/DATE/TIME` writes a page, figures and a CSV file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_bsl.report import write_report
from lightning_bsl.runs import default_baseline, find_runs, group_runs, logged_metrics, parse_target


def main(arguments: Sequence[str] | None = None) -> None:
    """Read runs, compare them, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="where to look for runs, however deep")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; `report` in the first folder by default")
    parser.add_argument("--baseline", metavar="GROUP", help="the group to compare with; by default the first of constant batch")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="METRIC=VALUE",
        help="a value to reach, as in val/accuracy=0.9; repeatable",
    )
    options = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        parser.error("figures need matplotlib: pip install 'lightning_bsl[report]'")
    try:
        targets = [parse_target(text) for text in options.target]
        search = find_runs(options.folders)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    groups = group_runs(search.runs)
    names = [group.name for group in groups]
    if options.baseline not in (None, *names):
        parser.error(f"--baseline {options.baseline!r}: no such group; there are {', '.join(map(repr, names))}")
    baseline = next((group for group in groups if group.name == options.baseline), default_baseline(groups))
    metrics = logged_metrics(groups)
    if unknown := [target.metric for target in targets if target.metric not in metrics]:
        parser.error(f"--target {unknown[0]}: no run logs it; logged are {', '.join(metrics)}")
    out = options.out or Path(options.folders[0]) / "report"
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out}: not a folder")
    files = write_report(search, groups, baseline, out, targets)
    unfinished = sum(len(group.unfinished) for group in groups)
    rest = [f"{unfinished} unfinished"] if unfinished else []
    rest += (
        [f"{len(search.without)} without metrics: {', '.join(name for name, _ in search.without)}"] if search.without else []
    )
    print(f"runs: {len(search.runs)}, groups: {len(groups)}{''.join(f'; {part}' for part in rest)}")
    print(f"{out}: {', '.join(file.name for file in files[:2])}, {len(files) - 2} figures")
