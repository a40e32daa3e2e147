"""The README's Python runs as it stands, and its commands name what exists."""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
from pathlib import Path

import pytest
from hydra.utils import instantiate

from harness.configs import compose_config
from harness.files import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    command
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    for command in line.split("#")[0].split("&&")
    if re.search(r"scripts/(train|plan)\.py", command)
]


def test_python_blocks_run_as_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # `main.py` is another file, which tests/integration/test_cli.py runs
    code = "\n".join(re.findall(r"```python\n(?!# main\.py)(.*?)```", README, flags=re.S))
    (tmp_path / "readme.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("readme.py", run_name="__main__")
    assert "128 9775 0.1" in capsys.readouterr().out


def test_tables_name_every_choice() -> None:
    for group in (
        "scheduler",
        "scheduler/batch_size",
        "scheduler/lr",
        "data",
        "model",
        "optimizer",
        "trainer",
        "logger",
        "callbacks",
        "experiment",
    ):
        (row,) = re.findall(rf"^\| `{group}` \|(.*)$", README, flags=re.M)
        choices = {file.stem for file in (ROOT / "conf" / group).glob("*.yaml") if not file.stem.startswith("_")}
        assert choices <= set(re.findall(r"`(\w+)`", row)), group


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    assert (ROOT / script).is_file()
    overrides = [argument for argument in arguments if not argument.startswith(("-", "ckpt_path="))]
    sweeps = [[override] for override in overrides]
    if "-m" in arguments:
        names = [override.partition("=") for override in overrides]
        sweeps = [[f"{name}={value}" for value in values.split(",")] for name, _, values in names]
    if "--compare" in arguments:
        names = arguments[arguments.index("--compare") + 1]
        overrides.remove(names)
        sweeps = [*([override] for override in overrides), [f"scheduler={name}" for name in names.split(",")]]
    for run in itertools.product(*sweeps):
        cfg = compose_config(*run)
        instantiate(cfg.scheduler), instantiate(cfg.data)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 9
