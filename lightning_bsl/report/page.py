"""The page that compares groups of runs: one HTML file that needs nothing else, and the same numbers as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_bsl.report.branches import plot_critical_batches
from lightning_bsl.report.figures import color_of, plot_groups
from lightning_bsl.report.markup import render
from lightning_bsl.runs.branches import read_critical_batches
from lightning_bsl.runs.compare import Target, compare, default_targets, unequal_budgets
from lightning_bsl.runs.find import METRICS, Found, Group
from lightning_bsl.runs.logs import AXES


def write_report(
    found: Found, groups: Sequence[Group], baseline: Group, folder: str | Path, targets: Sequence[Target] = ()
) -> list[Path]:
    """Write ``report.html``, ``report.csv`` and the figures as PNG files.

    Args:
        found: What was found.
        groups: Its runs in groups.
        baseline: The group with which the others are compared.
        folder: Where to write; made if it is not there.
        targets: What to reach; by default what every run reached and kept.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    folder, wanted = Path(folder), targets or default_targets(groups)
    folder.mkdir(parents=True, exist_ok=True)
    figures = plot_groups(groups, folder)
    critical = [(run.name, run, read_critical_batches(run.folder)) for group in groups for run in group.runs]
    if branched := [(name, run, table) for name, run, table in critical if table is not None]:
        figures.append(plot_critical_batches(branched, folder / "critical_batches.png"))
    numbers = compare(groups, wanted, baseline)
    numbers.to_csv(folder / "report.csv", index=False)
    first: dict[tuple[Any, ...], Any] = {}  # of those of a kind, or of a kind on an axis
    for line in numbers.fillna({"target": ""}).itertuples():
        for axis in ((), (line.axis,)):
            first.setdefault((line.what, line.group, line.metric, line.target, *axis), line)

    def at(what: str, group: Group, of: Target | str, *axis: str) -> Any:
        metric, value = (of, "") if isinstance(of, str) else (of.metric, of.value)
        return first.get((what, group.name, metric, value, *axis))

    curves: dict[str, list[Any]] = {"samples": []}  # against each axis, samples first
    for figure in figures:
        if figure.metric in METRICS:
            curves.setdefault(figure.axis, []).append(figure)
    page = render(
        "report.html",
        found=found,
        groups=groups,
        baseline=baseline,
        targets=wanted,
        chosen=bool(targets),
        at=at,
        methods=set(numbers["interval"]),
        budgets=unequal_budgets(groups),
        colors={group.name: color_of(i) for i, group in enumerate(groups)},
        axes=[axis for axis in AXES if any(group.logs(axis) for group in groups)],
        reached_axes=[axis for axis in AXES if axis != "epochs" and axis in set(numbers["axis"])],
        axis_names=AXES,
        metrics=METRICS,
        curves={axis: drawn for axis, drawn in curves.items() if drawn},
        schedule=[figure for figure in figures if figure.metric not in METRICS],
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return [folder / "report.html", folder / "report.csv", *(figure.file for figure in figures)]
