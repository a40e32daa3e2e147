"""The README's Python runs as it stands, and its commands name what exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_as_one_file(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.S))
    (tmp_path / "readme.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "128 9775 0.1" in done.stdout


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
    ):
        (row,) = re.findall(rf"^\| `{group}` \|(.*)$", README, flags=re.M)
        choices = {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")}
        assert choices <= set(re.findall(r"`(\w+)`", row)), group
