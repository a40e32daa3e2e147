"""The rooms of the library: who may import whom, and what the import of the callback loads."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.commands import run_python
from harness.files import ROOT

PACKAGE = ROOT / "lightning_bsl"
# from the top of the house to its ground: each imports only what comes behind it
ROOMS = ["app", "report", "runs", "population", "models", "datasets", "callbacks", "data", "theory", "schedules"]
HEAVY = {"torchvision", "PIL", "scipy", "sklearn", "hydra", "matplotlib", "pandas", "jinja2", "transformers", "datasets"}
NEVER = {  # what a room may not load, not even inside a function
    "schedules": {"torch", "lightning", "numpy", "scipy"},
    "theory": {"torch", "lightning", "hydra"},
    "data": HEAVY,
    "callbacks": HEAVY,
    "runs": {"hydra", "matplotlib", "torch"},
    "report": {"hydra", "torch"},
}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_rooms_are_these() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*ROOMS, "conf"}
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_downwards(room: str) -> None:
    above = {f"lightning_bsl.{other}" for other in ROOMS[: ROOMS.index(room)]}
    for path in (PACKAGE / room).rglob("*.py"):
        modules = set(imports(path))
        upwards = [module for module in modules if ".".join(module.split(".")[:2]) in above]
        assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"
        foreign = {module.split(".")[0] for module in modules} & NEVER.get(room, set())
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_scripts_are_one_call_into_the_app() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        if path.name not in ("benchmark.py", "gpu_check.py"):
            modules = {module for module in imports(path) if module.startswith("lightning_bsl")}
            assert modules == {f"lightning_bsl.app.{path.stem}", f"lightning_bsl.app.{path.stem}.main"}
            assert len(path.read_text().splitlines()) <= 8


LOADED = """
import builtins, json, sys

original, ours = builtins.__import__, set()


def note(name, globals=None, *rest, **named):
    module = original(name, globals, *rest, **named)
    if globals and str(globals.get("__name__")).split(".")[0] == "lightning_bsl":
        ours.add(name.split(".")[0])
    return module


{before}
builtins.__import__ = note
{code}
builtins.__import__ = original
print(json.dumps({"by us": sorted(ours), "modules": sorted(n for n in sys.modules if n.startswith("lightning_bsl"))}))
{after}
"""


BEFORE = """
import warnings
import lightning.pytorch, torchvision
from omegaconf import OmegaConf

OmegaConf.register_new_resolver("mul", lambda x: "theirs")
filters = [*warnings.filters]
"""
AFTER = """
import lightning_bsl.app.compose

assert OmegaConf.create({"a": "${mul:1}"}).a == "theirs"  # what belongs to the user's process stays as it was
assert warnings.filters == filters
"""


@pytest.mark.parametrize("code, rooms, foreign", [
    ("from lightning_bsl import BatchLRScheduler", {"callbacks", "data", "schedules", "theory"},
     {"lightning", "lightning_utilities", "numpy", "torch", "torchmetrics", "tqdm"}),
    ("import lightning_bsl", set(), set()),
    ("import lightning_bsl.schedules", {"schedules"}, set()),
    ("import lightning_bsl.theory", {"theory", "schedules"}, {"numpy"}),
])  # fmt: skip
def test_what_an_import_loads(code: str, rooms: set[str], foreign: set[str], tmp_path: Path) -> None:
    # Lightning itself loads torchvision, scipy and more where they are installed: what counts is what our modules ask for
    before, after = (BEFORE, AFTER) if "callbacks" in rooms else ("", "")
    program = LOADED.replace("{before}", before).replace("{code}", code).replace("{after}", after)
    loaded = json.loads(run_python("-c", program, folder=tmp_path).splitlines()[-1])
    assert {name.split(".")[1] for name in loaded["modules"] if "." in name} == rooms
    assert set(loaded["by us"]) - sys.stdlib_module_names - {"lightning_bsl"} <= foreign
    assert not set(loaded["by us"]) & HEAVY
