"""The library as pip installs it: from its wheel, in an environment without the clone."""

from __future__ import annotations

import sysconfig
from functools import partial
from pathlib import Path

from harness.commands import run_python
from harness.files import ROOT


def install_wheel(folder: Path) -> Path:
    """Build the wheel and install it beside the packages that are installed here; returns the environment's ``bin``.

    Args:
        folder: Where to put the wheel and the environment.
    """
    python = partial(run_python, "-m", folder=folder)
    python("pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT)
    (wheel,) = folder.glob("lightning_bsl-*.whl")
    python("venv", "--without-pip", folder / "venv")
    interpreter = folder / "venv" / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")}))
    # the other packages, but not the clone: the links of an editable install are not followed from here
    (packages / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python("pip", "--python", interpreter, "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    return interpreter.parent
