"""What the site draws and writes while it is built: schedules, configuration, commands, and pages of the root's files."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lightning_bsl import schedules
from lightning_bsl.app.commands import COMMANDS
from lightning_bsl.schedules import Horizon, JointSchedule, Progress, ScalingRule, plan

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
ROOT_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
BATCH, RATE = "#1f6fb5", "#d1622b"

# every family of schedules and every scaling rule, as it is drawn
SCHEDULES = (
    "Constant(128)",
    "Exponential(8, factor=2, every=30, maximum=4096)",
    "Linear(32, 512, over=100, every=10)",
    "Polynomial(8, slope=16, every=30)",
    "Milestones([128, 256, 512], at=[0.03, 0.1])",
    "Diminishing(0.1)",
    "Cosine(0.1)",
    "PolynomialDecay(0.1, power=2)",
    "Warmup(0.1, then=Cosine(0.5), over=30, every=3)",
    "WarmupStableDecay(0.1, shape='sqrt')",
    "Sequence([Linear(0.0, 0.1), 0.1, Cosine(0.1)], at=[0.05, 0.5])",
    "LinearScaling(0.1, base_batch_size=128)",
    "SqrtScaling(0.1, base_batch_size=128)",
    "NoiseScaling(0.4, noise_batch_size=256)",
    "SurgeScaling(0.001, noise_batch_size=256)",
)
EPOCHS, EXAMPLES, STEPS = 300, 50_000, 391  # of the figures: CIFAR at a batch size of 128


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and figures that lie in no file under docs/.

    Args:
        files: The files of the site so far.
        config: Its configuration.
    """
    pages = {page: from_root(name, str(config.repo_url)) for name, page in ROOT_PAGES.items()}
    for path, content in (pages | figures()).items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the parts that are made here in the places of their names: ``<!-- make: NAME -->``.

    Args:
        markdown: The text of a page.
    """
    return re.sub(r"<!-- make: (\w+) -->", lambda name: PARTS[name[1]](), markdown)


# --- files at the root of the repository


def from_root(name: str, repository: str) -> str:
    """A file at the root of the repository as a page of the site, with links that hold there.

    Args:
        name: The file.
        repository: The address of the repository.
    """

    def moved(link: re.Match[str]) -> str:
        path = link[1]
        if path.startswith("docs/"):
            return f"]({path.removeprefix('docs/')}"
        return f"]({ROOT_PAGES[path]}" if path in ROOT_PAGES else f"]({repository.rstrip('/')}/blob/main/{path}"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#]+)", moved, (ROOT / name).read_text())


# --- configuration


def choices(group: str) -> dict[str, str]:
    """The choices of a configuration group and their files' text.

    Args:
        group: The folder under conf/.
    """
    files = sorted((CONF / group).glob("[!_]*.yaml"))
    return {file.stem: file.read_text() for file in files}


def explanation(text: str) -> str:
    """What a configuration file says of itself: its first comment, else what it makes.

    Args:
        text: The file.
    """
    comment = [line for line in text.splitlines() if not line.startswith("# @package")]
    first = next((number for number, line in enumerate(comment) if not line.startswith("#")), len(comment))
    if first:
        return " ".join(line.removeprefix("# ") for line in comment[:first])
    target = re.search(r"^ *_target_: (\S+)", text, flags=re.M)
    return f"`{target[1]}`" if target else ""


def folded(title: str, files: Iterable[Path]) -> str:
    """The text of configuration files, which opens with a click.

    Args:
        title: What stands to be clicked.
        files: The files.
    """
    lines = [f'??? quote "{title}"']
    for file in files:
        text = file.read_text().rstrip().splitlines()
        lines += ["", *(f"    {line}" for line in (f'```yaml title="{file.relative_to(ROOT)}"', *text, "```"))]
    return "\n".join([*lines, ""])


def configuration() -> str:
    """Every group of the configuration, its choices and what they say."""
    primary = (CONF / f"{name}.yaml" for name in ("train", "branch", "search", "surge_grid", "_run", "_grid"))
    parts = [folded("The files that the commands begin with", primary)]
    for folder in sorted({file.parent for file in CONF.rglob("*.yaml")} - {CONF}):
        group = str(folder.relative_to(CONF))
        parts += [f"## `{group}`", "", "| choice | |", "|---|---|"]
        parts += [f"| `{name}` | {explanation(text).replace('|', chr(92) + '|')} |" for name, text in choices(group).items()]
        parts += ["", folded(f"The files of conf/{group}", sorted(folder.glob("*.yaml")))]
    return "\n".join(parts)


# --- commands


def commands() -> str:
    """Every command: what it does, and its help."""
    parts = []
    for name, what in COMMANDS.items():
        script = name.removeprefix("bsl-").replace("-", "_")
        source = (ROOT / "lightning_bsl" / "app" / f"{script}.py").read_text()
        parts += [f"## `{name}`", ""]
        if file := re.search(r'config_name="(\w+)"', source):
            parts += [re.sub("``?", "`", ast.get_docstring(ast.parse(source)) or ""), ""]
            parts += [f"It composes [`conf/{file[1]}.yaml`](configuration.md). In a clone: `python scripts/{script}.py`.", ""]
        else:
            module = importlib.import_module(f"lightning_bsl.app.{script}")
            parts += [f"{what[0].upper()}{what[1:]}.", "", "```text", help_of(name, module.main), "```", ""]
    return "\n".join(parts)


def help_of(name: str, main: Callable[[list[str]], None]) -> str:
    """What a command prints for ``--help``.

    Args:
        name: The command.
        main: Its function.
    """
    called, text = sys.argv, io.StringIO()
    try:
        sys.argv = [name]
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main(["--help"])
    finally:
        sys.argv = called
    return text.getvalue().strip()


# --- schedules


def drawn(text: str) -> Any:
    """The schedule or the scaling rule that an expression makes.

    Args:
        text: The expression, in terms of `lightning_bsl.schedules`.
    """
    return eval(text, vars(schedules))


def section(text: str) -> str:
    """The part of the page of schedules that is about one family.

    Args:
        text: The expression that is drawn.
    """
    name = text.partition("(")[0]
    said = (inspect.getdoc(getattr(schedules, name)) or "").split("\n\n")[0]
    api = f"[API][lightning_bsl.schedules.{name}]"
    return f"### {name}\n\n{said} {api}\n\n```python\n{text}\n```\n\n![{text}](plots/{name}.svg)\n"


def preset_section(name: str) -> str:
    """The part of the page of schedules that is about one choice of the group ``scheduler``.

    Args:
        name: The choice.
    """
    figure = f"![scheduler={name}](plots/scheduler/{name}.svg)\n" if planned(name) is not None else ""
    return f"### scheduler={name}\n\n{explanation(choices('scheduler')[name])}\n\n{figure}"


@cache
def planned(name: str) -> JointSchedule | None:
    """The schedules of a choice of the group ``scheduler``; ``None`` where a measurement decides.

    Args:
        name: The choice.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["data=cifar100", f"scheduler={name}", f"trainer.max_epochs={EPOCHS}"])
    if "trigger" in cfg.scheduler:
        return None
    return JointSchedule.of(instantiate(cfg.scheduler.batch_size), instantiate(cfg.scheduler.get("lr")))


def families() -> str:
    """Every family of schedules, with its figure."""
    return "\n".join(section(text) for text in SCHEDULES if not isinstance(drawn(text), ScalingRule))


def scaling_rules() -> str:
    """Every scaling rule, with its figure."""
    return "\n".join(section(text) for text in SCHEDULES if isinstance(drawn(text), ScalingRule))


def presets() -> str:
    """Every choice of the group ``scheduler``, with its figure."""
    return "\n".join(preset_section(name) for name in choices("scheduler"))


PARTS: Mapping[str, Callable[[], str]] = {
    function.__name__: function for function in (configuration, commands, families, scaling_rules, presets)
}


def figures() -> dict[str, bytes]:
    """The figures of the schedules, by their path in the site."""
    made = {f"plots/{text.partition('(')[0]}.svg": figure_of(drawn(text)) for text in SCHEDULES}
    joint = {name: planned(name) for name in choices("scheduler")}
    return made | {f"plots/scheduler/{name}.svg": figure_of_plan(schedule) for name, schedule in joint.items() if schedule}


def figure_of(schedule: Any) -> bytes:
    """Draw a schedule over a run, or a scaling rule over batch sizes.

    Args:
        schedule: Either.
    """
    figure = Figure((5.5, 2.6))
    axis = figure.add_axes((0.14, 0.2, 0.83, 0.75))
    if isinstance(schedule, ScalingRule):
        sizes = [2**power for power in range(3, 13)]
        axis.loglog(sizes, [schedule(size) for size in sizes], color=RATE, base=2)
        axis.set(xlabel="batch size", ylabel="learning rate")
        axis.yaxis.set_major_formatter(ScalarFormatter())
    else:
        clocks = list(run())
        axis.step([clock.epoch for clock in clocks], [schedule(clock) for clock in clocks], color=BATCH, where="post")
        axis.set(xlabel="epochs", ylabel="value")
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    return svg(figure)


def run() -> Iterator[Progress]:
    """The clock at the start of each epoch of a run at a constant batch size."""
    horizon = Horizon(EPOCHS, EPOCHS * STEPS, EPOCHS * EXAMPLES)
    for epoch in range(EPOCHS):
        yield Progress(epoch, epoch * STEPS, epoch * EXAMPLES, horizon)


def figure_of_plan(schedule: JointSchedule) -> bytes:
    """Draw the batch size and the learning rate of a run.

    Args:
        schedule: Both schedules.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a rate that grows too fast: the page is not the place
        stretches = [stretch for stretch, _ in plan(schedule, EXAMPLES, epochs=EPOCHS).stretches_of_epochs()]
    epochs = [stretch.start.samples / EXAMPLES for stretch in stretches]
    figure = Figure((8, 2.6))
    left, right = figure.add_axes((0.09, 0.2, 0.38, 0.75)), figure.add_axes((0.59, 0.2, 0.38, 0.75))
    left.step(epochs, [stretch.batch_size for stretch in stretches], color=BATCH, where="post")
    left.set(xlabel="epochs", ylabel="batch size")
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter(ScalarFormatter())
    rates = [schedule.lr_at(stretch.start, stretch.batch_size) or 0.0 for stretch in stretches]
    right.step(epochs, rates, color=RATE, where="post")
    right.set(xlabel="epochs", ylabel="learning rate")
    right.set_ylim(bottom=0)
    return svg(figure)


def svg(figure: Figure) -> bytes:
    """A figure as an SVG file.

    Args:
        figure: The figure.
    """
    for axis in figure.axes:
        axis.grid(alpha=0.25)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
