"""What the README and the site say holds: Python blocks run, commands compose, the site builds, and nothing is left out."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import lightning_bsl
from harness.commands import run_script
from harness.configs import CHOICES, compose_config
from harness.files import ROOT
from lightning_bsl import schedules
from lightning_bsl.schedules import ScalingRule, Schedule

DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
}


@cache
def hooks() -> ModuleType:
    """The module that makes parts of the site."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.S)


# --- Python


def python(page: str) -> str:
    """All Python of a page, as one file; `main.py` is another one, which tests/integration/test_cli.py runs."""
    return "\n".join(block for block in blocks(page, "python") if not block.startswith("# main.py"))


@pytest.mark.parametrize("page", [page for page in PAGES if python(page)])
def test_python_blocks_run_as_one_file(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.py").write_text(python(page))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        runpy.run_path("page.py", run_name="__main__")


def test_the_steps_of_the_schedules_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.py").write_text(python("docs/schedules.md"))
    runpy.run_path(str(tmp_path / "page.py"))
    assert "128 9775 0.1" in capsys.readouterr().out  # 25 epochs of ceil(50,000 / 128) steps


# --- commands


class Command(NamedTuple):
    """A command of a page."""

    page: str
    script: str
    arguments: tuple[str, ...]

    @classmethod
    def read(cls, page: str, text: str) -> Command | None:
        """A command line of ours; ``None`` for another."""
        match = re.match(r"\s*(?:bsl-([a-z-]+)|python scripts/(\w+)\.py)(?=\s|$)(.*)", text)
        return match and cls(page, (match[1] or match[2]).replace("-", "_"), tuple(shlex.split(match[3], comments=True)))

    def overrides(self) -> list[list[str]]:
        """The overrides of each run: of the only one, or of as many as it takes to have each value of a sweep."""
        options = {"-m", "--config-dir", "--compare"}
        rest = list(self.arguments)
        for option in ("--config-dir", "--compare"):
            if option in rest:
                del rest[rest.index(option) + 1]
        values = [[argument] for argument in rest if argument not in options]
        if "-m" in self.arguments:
            pairs = [argument.partition("=") for (argument,) in values]
            values = [[f"{name}={value}" for value in several.split(",")] for name, _, several in pairs]
        if "--compare" in self.arguments:
            names = self.arguments[self.arguments.index("--compare") + 1]
            values.append([f"scheduler={name}" for name in names.split(",")])
        most = max(map(len, values), default=1)
        return [list(run) for run in itertools.islice(zip(*map(itertools.cycle, values)), most)]


def commands() -> list[Command]:
    """The commands of all pages, in blocks and in sentences, and of the commands' own documentation."""
    found = []
    pages = PAGES | {"docs/commands.md (made)": hooks().commands()}
    for page, text in pages.items():
        lines = [
            part
            for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S)
            for line in block.splitlines()
            for part in line.split("&&")
        ]
        lines += re.findall(r"(?<!`)`((?:bsl-|python scripts/)[^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
        found += [command for line in lines if (command := Command.read(page, line))]
    return found


COMMANDS = [command for command in dict.fromkeys(commands()) if command.arguments]
HYDRA = {"train": "train", "plan": "train", "search": "search", "surge_grid": "surge_grid"}


def name_of(value: object) -> str | None:
    """The name of a case."""
    return f"{value.page}: {value.script} {' '.join(value.arguments)}" if isinstance(value, Command) else None


def composed() -> list[Any]:
    """The commands of Hydra; by default run as many as it takes to have each choice and each key, the others are slow."""
    seen: set[str] = set()
    found = []
    for command in COMMANDS:
        if command.script in HYDRA:
            overrides = {
                override.partition("=")[0] if "." in override.partition("=")[0] else override
                for run in command.overrides()
                for override in run
            }
            found.append(pytest.param(command, marks=() if overrides - seen else pytest.mark.slow))
            seen |= overrides
    return found


@pytest.mark.parametrize("command", composed(), ids=name_of)
def test_commands_compose(command: Command, tmp_path: Path) -> None:
    assert (ROOT / "scripts" / f"{command.script}.py").is_file()
    own = "--config-dir" in command.arguments
    if own:
        for group, text in (("data", "my_package.MyDataModule"), ("model", "my_package.MyModel")):
            (block,) = [block for block in blocks(command.page, "yaml") if text in block]
            (tmp_path / group).mkdir()
            (tmp_path / group / "mine.yaml").write_text(block)
    for run in command.overrides():
        cfg = compose_config(*run, *[f"hydra.searchpath=[file://{tmp_path}]"] * own, name=HYDRA[command.script])
        instantiate(cfg.scheduler)
        if own:
            OmegaConf.to_container(cfg.data, resolve=True)
        else:
            instantiate(cfg.data)
        if command.script == "surge_grid":
            instantiate(cfg.grid)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.script not in HYDRA], ids=name_of)
def test_other_commands_have_their_options(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = [argument for argument in command.arguments if argument.isidentifier()][:1] * (command.script == "benchmark")
    assert run_script(f"{command.script}.py", *subject, "--help", monkeypatch=monkeypatch) == 0
    help_text = capsys.readouterr().out
    for option in (argument for argument in command.arguments if argument.startswith("--")):
        assert re.search(rf"{option}\b", help_text), help_text


def test_there_are_commands_of_every_kind() -> None:
    assert {command.script for command in COMMANDS} >= {*HYDRA, "report", "surge_report", "benchmark"}
    assert len(COMMANDS) >= 50


def test_a_hydra_application_takes_the_schedules(tmp_path: Path) -> None:
    page = "docs/guides/hydra.md"
    (config,) = [block for block in blocks(page, "yaml") if block.startswith("# conf/config.yaml")]
    (tmp_path / "config.yaml").write_text(config)
    lines = re.findall(r"^python main\.py (.*)$", PAGES[page], flags=re.M)
    assert len(lines) == 3
    for line in lines:
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            cfg = compose("config", shlex.split(line))
        node = cfg.scheduler if "scheduler" in cfg else cfg.callbacks.batch_lr
        assert instantiate(node).schedule.lr.start == (0.01 if "lr=0.01" in line else 0.05)


# --- the site


@pytest.mark.slow  # .ci/run builds the site
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr[-3000:]
    assert "WARNING" not in built.stderr, built.stderr[-3000:]
    for page in ("index.html", "api/schedules/index.html", "configuration/index.html", "plots/Cosine.svg"):
        assert (tmp_path / "site" / page).stat().st_size > 1000


def test_the_configuration_page_names_every_choice() -> None:
    sections = dict(re.findall(r"^## `([\w/]+)`\n(.*?)(?=^## |\Z)", hooks().configuration(), flags=re.M | re.S))
    for group, choice in CHOICES:
        assert f"| `{choice}` |" in sections[group], f"{group}={choice}"


def test_every_schedule_is_drawn() -> None:
    drawn = {text.partition("(")[0] for text in hooks().SCHEDULES}
    kinds = [
        value for value in vars(schedules).values() if inspect.isclass(value) and issubclass(value, Schedule | ScalingRule)
    ]
    assert drawn == {kind.__name__ for kind in kinds if not inspect.isabstract(kind)}


def test_quoted_messages_occur_in_the_source() -> None:
    quotes = re.findall(r"^\| ``(.+?)`` \|", PAGES["docs/errors.md"], flags=re.M)
    assert len(quotes) > 50
    texts = [
        node.value
        for file in (ROOT / "lightning_bsl").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [quote for quote in quotes if not any(quote.strip() in text for text in texts)] == []


def test_links_to_files_of_the_repository_hold() -> None:
    for page, text in PAGES.items():
        for path in re.findall(r"lightning-bsl/lightning_bsl/(?:blob|tree)/main/([\w./-]+)", text):
            assert (ROOT / path).exists(), f"{page}: {path}"
    for path in re.findall(r"\]\(((?!https:)[^)#]+)", PAGES["README.md"] + PAGES["CONTRIBUTING.md"]):
        assert (ROOT / path).exists(), path


# --- words


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 130


def test_papers_have_their_names() -> None:
    for page, text in PAGES.items():
        assert not re.findall(r"\b(?:P[1-4]|M18)\b", text), page


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightning_bsl.__version__
    assert re.search(rf"^## \[.*{lightning_bsl.__version__}", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
