"""The page that compares groups of runs: one HTML file that needs nothing else, and the same numbers as CSV."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from lightning_bsl.report.markup import (
    NONE,
    Cell,
    Table,
    csv_values,
    estimate_cell,
    image_html,
    number,
    page_html,
    table_html,
)
from lightning_bsl.report.overlays import Figure, color_of, plot_groups
from lightning_bsl.runs.compare import (
    Ended,
    Estimate,
    Held,
    Reached,
    Target,
    against_bounds,
    default_targets,
    how_soon,
    unequal_budgets,
    where_ended,
)
from lightning_bsl.runs.find import AXES, METRICS, Found, Group
from lightning_bsl.theory import LEVEL


def write_report(
    found: Found, groups: Sequence[Group], baseline: Group, folder: str | Path, targets: Sequence[Target] = ()
) -> list[Path]:
    """Write ``report.html``, ``report.csv`` and the figures as PNG files.

    Args:
        found: What was found.
        groups: Its runs in groups.
        baseline: The group with which the others are compared.
        folder: Where to write; made if it is not there.
        targets: What to reach; by default what every run reached.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    soon = how_soon(groups, targets or default_targets(groups), baseline)
    ended, held = where_ended(groups), against_bounds(groups)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = plot_groups(groups, folder)
    tables = [_groups_table(groups), _soon_table(soon, groups, baseline, chosen=not targets), _ended_table(ended, groups)]
    if held:
        tables.append(_held_table(held, groups))
    page = _page(_notes(found, groups), tables, _runs_table(groups), figures, len(found.runs))
    (folder / "report.html").write_text(page, encoding="utf-8")
    _write_csv(folder / "report.csv", soon, ended, held, baseline)
    return [folder / "report.html", folder / "report.csv", *(figure.file for figure in figures)]


# --- what is said


def _notes(found: Found, groups: Sequence[Group]) -> list[str]:
    notes = []
    if budgets := unequal_budgets(groups):
        names = {samples: escape("; ".join(name for name, of in budgets if of == samples)) for _, samples in budgets}
        listed = ". ".join(f"{samples} samples: {name}" for samples, name in names.items())
        notes.append(f"<b>Unequal budgets.</b> The runs differ in the samples that they trained on. {listed}.")
    if unfinished := [(group, run) for group in groups for run in group.unfinished]:
        listed = "; ".join(f"{escape(run.name)} ({escape(group.name)}): {run.progress}" for group, run in unfinished)
        notes.append(
            f"<b>{len(unfinished)} unfinished.</b> {listed}. They are drawn as thin dashed lines and left out of the means "
            "unless no run of their group has ended."
        )
    if found.without:
        listed = "; ".join(f"{escape(name)} ({escape(reason)})" for name, reason in found.without)
        notes.append(f"<b>{len(found.without)} without metrics.</b> {listed}.")
    for group in groups:
        seeds = [run.seed for run in group.runs if run.seed is not None]
        if len(set(seeds)) < len(seeds):
            notes.append(f"<b>The same seed more than once</b> in {escape(group.name)}, so it is not paired with others.")
    if untimed := [group.name for group in groups if not any("seconds" in run.metrics for run in group.runs)]:
        notes.append(f"<b>No seconds</b> were logged by {escape('; '.join(untimed))}.")
    return notes + [escape(note) for note in found.notes]


def _groups_table(groups: Sequence[Group]) -> Table:
    axes = [axis for axis in AXES if any(axis in run.metrics for group in groups for run in group.runs)]
    rows = []
    for group in groups:
        seeds = ", ".join("?" if run.seed is None else str(run.seed) for run in group.runs)
        state = f"{len(group.runs) - len(group.unfinished)} of {len(group.runs)}"
        means = [estimate_of([run.reached(axis) for run in group.counted]) for axis in axes]
        rows.append([_name(group, groups), Cell(escape(seeds)), Cell(state), *(Cell(number(mean), mean) for mean in means)])
    note = "Runs that differ in their seed only are one group. Lengths are means over its runs that have ended."
    return Table("Groups", ["group", "seeds", "ended", *axes], rows, note)


def _soon_table(soon: Sequence[Reached], groups: Sequence[Group], baseline: Group, chosen: bool) -> Table:
    axes = [axis for axis in AXES if axis != "epochs" and any(axis in each.means for each in soon)]
    rows = []
    for each in soon:
        cells = [
            _name(each.group, groups),
            Cell(escape(str(each.target))),
            Cell(f"{each.reached} of {each.of}" if each.of else "not logged", each.reached / each.of if each.of else -1),
        ]
        for axis in axes:
            cells.append(_estimate(each.means.get(axis)))
            cells.append(
                Cell("1", 1) if each.group is baseline and each.reached else _estimate(each.ratios.get(axis), "\u00d7")
            )
        rows.append(cells)
    methods = sorted({ratio.method for each in soon for ratio in each.ratios.values() if ratio.method})
    said = {
        "paired": "seed by seed (paired t) where both groups have the same seeds",
        "Welch": "as independent samples (Welch) where not",
    }
    note = (
        f"{'Targets are the worst of the best values of the runs: every run reached them. ' if chosen else ''}"
        "A target is reached at the first logged point at it or beyond it: nothing is interpolated, differences are as fine as "
        "the logging. Means over the runs that reached it; &times; is the ratio of geometric means to the baseline "
        f"<b>{escape(baseline.name)}</b>, where all runs of both reached it. In brackets {LEVEL:.0%} intervals: t of means, t "
        f"of the logarithm of ratios{''.join(', ' + said[method] for method in methods)}. A single run has none."
    )
    head = ["group", "target", "reached", *(title for axis in axes for title in (axis, f"\u00d7 {axis}"))]
    return Table("To the targets", head, rows, note)


def _ended_table(ended: Sequence[Ended], groups: Sequence[Group]) -> Table:
    rows = [
        [
            _name(one.group, groups),
            Cell(escape(METRICS[one.metric])),
            _estimate(one.last),
            _estimate(one.best),
            _count(one.last),
        ]
        for one in ended
    ]
    note = f"Means over the runs, in brackets their {LEVEL:.0%} t-interval."
    return Table("Final and best values", ["group", "metric", "final", "best", "runs"], rows, note)


def _held_table(held: Sequence[Held], groups: Sequence[Group]) -> Table:
    rows = [
        [_name(one.group, groups), _exact(one.measured), _exact(one.bound), _exact(one.measured / one.bound), _count(one)]
        for one in held
    ]
    note = (
        "The least mean over the runs of ||∇f||², as measured, and the most that it can be in expectation: the bound of "
        "arXiv 2409.08770, for the plan up to the last measurement."
    )
    return Table("Bound and measurement", ["group", "min ||∇f||²", "bound", "measured / bound", "runs"], rows, note)


def _runs_table(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        for run in group.runs:
            rows.append([
                _name(group, groups),
                Cell(escape(run.name)),
                Cell("?" if run.seed is None else str(run.seed), run.seed),
                Cell(escape(run.progress)),
                *(Cell(number(run.reached(axis)), run.reached(axis)) for axis in ("samples", "steps", "seconds")),
            ])  # fmt: skip
    return Table("Runs", ["group", "run", "seed", "state", "samples", "steps", "seconds"], rows)


def estimate_of(values: Iterable[float]) -> float:
    """The mean of the values that are known."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _name(group: Group, groups: Sequence[Group]) -> Cell:
    index = next(i for i, each in enumerate(groups) if each is group)
    name = re.sub(r"([_=/,]\s*)", r"\1<wbr>", escape(group.name))  # where a long name may go on in the next line
    return Cell(f'<span><i style="background:{color_of(index)}"></i><b>{name}</b></span>')


def _estimate(given: Estimate | None, before: str = "") -> Cell:
    if given is None or not given.number:
        return Cell(NONE, math.nan)
    return estimate_cell(*given[:3], before)


def _count(of: Estimate | Held) -> Cell:
    return Cell(str(of.number), of.number)


def _exact(value: float) -> Cell:
    return Cell(f"{value:.3e}", value)


# --- how it is said


def _page(notes: Sequence[str], tables: Sequence[Table], runs: Table, figures: Sequence[Figure], count: int) -> str:
    body = f"""{"".join(map(table_html, tables[:2]))}
{_figures(figures)}
{"".join(map(table_html, (*tables[2:], runs)))}"""
    return page_html(f"{count} {'run' if count == 1 else 'runs'} compared", notes, body)


def _figures(figures: Sequence[Figure]) -> str:
    over = [axis for axis in AXES if any(figure.axis == axis and figure.metric in METRICS for figure in figures)]
    first = "samples" if "samples" in over else next(iter(over), "")
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{axis}"{" checked" if axis == first else ""}> {AXES[axis]}</label>'
        for axis in over
    )
    parts = [
        f'<div class="figures" data-axis="{axis}">'
        + "".join(_image(figure) for figure in figures if figure.axis == axis and figure.metric in METRICS)
        + "</div>\n"
        for axis in sorted(over, key=lambda axis: axis != first)
    ]
    rest = "".join(_image(figure) for figure in figures if figure.metric not in METRICS)
    return f"""<h2>Curves</h2>
<p class="note">A line is the mean over the runs of a group that have ended, over the stretch that all of them cover; its
band goes from the least to the largest of them. A thin dashed line is a run that has not ended.</p>
<fieldset class="axes" hidden><legend class="note">Against</legend>{choices}</fieldset>
{"".join(parts)}
<h2>Batch size and learning rate</h2>
<div class="figures">{rest}</div>
"""


def _image(figure: Figure) -> str:
    return image_html(figure.file, figure.title)


# --- the same as CSV


def _write_csv(path: Path, soon: Sequence[Reached], ended: Sequence[Ended], held: Sequence[Held], baseline: Group) -> None:
    """A line for each number: what it is, of which group, with its interval."""
    lines: list[list[object]] = []
    for each in soon:
        counts = [each.reached, each.of]
        for axis, mean in each.means.items():
            lines.append(["to_target", each.group.name, each.target.metric, each.target.value, axis, *mean[:3], *counts, "t"])
        for axis, ratio in each.ratios.items():
            kind = f"ratio_to_{baseline.name}"
            lines.append(
                [kind, each.group.name, each.target.metric, each.target.value, axis, *ratio[:3], *counts, ratio.method]
            )
        if not each.means:
            lines.append(["to_target", each.group.name, each.target.metric, each.target.value, "", "", "", "", *counts, ""])
    for one in ended:
        for kind, some in (("final", one.last), ("best", one.best)):
            lines.append([kind, one.group.name, one.metric, "", "", *some[:3], some.number, some.number, "t"])
    for pair in held:
        for kind, value in (("measured_min_squared_norm", pair.measured), ("bound", pair.bound)):
            lines.append([kind, pair.group.name, "full_gradient_norm", "", "", value, "", "", pair.number, pair.number, ""])
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "group", "metric", "target", "axis", "value", "low", "high", "runs", "of", "interval"])
        writer.writerows(map(csv_values, lines))
