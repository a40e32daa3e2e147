"""A hub that cannot be reached: an error before training, in bounded time, that says what was wanted and what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from harness.children import Child
from harness.files import ROOT
from lightning_bsl.datasets import ELI5Category, TextFolder
from lightning_bsl.models import distilgpt2

BOUND = 60.0  # seconds for one attempt
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


def out_of_reach(cache: Path, proxy: str) -> None:
    """In a child: nothing is in the hub's cache, and every connection goes to ``proxy``."""
    os.environ |= dict.fromkeys(PROXIES, proxy)
    for name in ("NO_PROXY", "no_proxy", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.pop(name, None)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        setattr(huggingface_hub.constants, name, str(cache))
    huggingface_hub.constants.HF_HUB_OFFLINE = False


@pytest.fixture
def closed() -> Iterator[str]:
    """A port at which nobody listens."""
    with socket.socket() as bound:  # taken, so that nobody else begins to listen there
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """A port at which connections are taken, and no answer comes."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def eli5(root: Path) -> Any:
    return ELI5Category(root / "data", download=True, cache_dir=root / "cache").prepare_data()


def tokenizer(root: Path) -> Any:
    (root / "text").mkdir()
    for number in range(3):
        (root / "text" / f"{number}.txt").write_text(f"This is the text {number}. " * 30)
    return TextFolder(root / "text", tokenizer="openai-community/gpt2", cache_dir=root / "cache").prepare_data()


def model(root: Path) -> Any:
    return distilgpt2(pretrained=True)


SAID: dict[Callable[[Path], Any], tuple[str, str]] = {
    eli5: ("rexarski/eli5_category cannot be reached on huggingface.co", "put them into {root}/data/eli5_category"),
    tokenizer: (
        "openai-community/gpt2 cannot be reached on huggingface.co",
        "`tokenizer=DIR`, a folder with its tokenizer.json",
    ),
    model: ("distilbert/distilgpt2 cannot be reached on huggingface.co", "write `pretrained=DIR` here"),
}


def check(fetch: Callable[[Path], Any], proxy: str, root: Path) -> None:
    def work() -> None:
        out_of_reach(root / "hub", proxy)
        fetch(root)

    began = time.monotonic()
    ended = Child(work, root).end(2 * BOUND)
    assert ended.code == 1 and time.monotonic() - began < BOUND
    last = ended.text.strip().splitlines()[-1]
    assert all(part.format(root=root) in last for part in SAID[fetch]), ended.text
    assert not [path for path in root.rglob("*") if path.suffix in (".parquet", ".bin")]


@pytest.mark.quick(fetch=[eli5, tokenizer])
@pytest.mark.parametrize("fetch", SAID)
def test_nobody_listens(fetch: Callable[[Path], Any], closed: str, tmp_path: Path) -> None:
    check(fetch, closed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fetch", SAID)
def test_nobody_answers(fetch: Callable[[Path], Any], silent: str, tmp_path: Path) -> None:
    check(fetch, silent, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, said",
    [
        (("data=eli5", "data.download=true", "data.samples_per_epoch=64"), SAID[eli5]),
        (("data=text", "data.tokenizer=gpt2", "data.samples_per_epoch=64"), ("gpt2 cannot be reached", "`tokenizer=DIR`")),
        (("data=pydoc", "model=distilgpt2", "model.net.pretrained=true", "data.samples_per_epoch=64"), SAID[model]),
    ],
)
def test_of_a_command(overrides: tuple[str, ...], said: tuple[str, str], closed: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    if "data=text" in overrides:
        for number in range(3):
            (tmp_path / "data" / f"{number}.txt").write_text(f"This is the text {number}. " * 30)
    names = ("NO_PROXY", "no_proxy", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= dict.fromkeys(PROXIES, closed) | {
        "HF_HOME": str(tmp_path / "hub"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    root = [] if "data=pydoc" in overrides else [f"data.root={tmp_path / 'data'}"]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"hydra.run.dir={tmp_path / 'run'}", *overrides, *root]
    began = time.monotonic()
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=4 * BOUND)
    assert ended.returncode == 1 and time.monotonic() - began < 2 * BOUND
    assert all(part.format(root=tmp_path) in ended.stderr for part in said) and "Traceback" not in ended.stderr, ended.stderr
    assert not (tmp_path / "run").exists()  # nothing has begun
