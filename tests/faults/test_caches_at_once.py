"""Two processes that build one cache at the same time, and one that is killed while it does."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from harness.broken import tiny_imagenet
from harness.children import Child, before
from harness.commands import kill
from lightning_bsl.data import BatchSizeDataModule
from lightning_bsl.datasets import PydocTopics, TextFolder, TinyImageNet

Make = Callable[[Path], BatchSizeDataModule]

pytestmark = pytest.mark.slow  # real processes that wait for each other


def of_text(root: Path) -> TextFolder:
    return TextFolder(root / "text", block_size=8, tokenizer="train", vocab_size=300, cache_dir=root / "cache")


def of_pydoc(root: Path) -> PydocTopics:
    return PydocTopics(block_size=64, cache_dir=root / "cache")


def of_images(root: Path) -> TinyImageNet:
    return TinyImageNet(root)


def write(root: Path) -> None:
    """The data of all three."""
    (root / "text").mkdir(parents=True)
    for number in range(12):
        (root / "text" / f"{number}.txt").write_text(" ".join(f"word{number * k % 97}" for k in range(200)))
        os.utime(root / "text" / f"{number}.txt", (1e9, 1e9))
    tiny_imagenet(root)


def cached(root: Path) -> dict[str, bytes]:
    """The caches that a run would trust."""
    folders = (
        [path for path in (root / "cache").glob("*") if not path.name.startswith(".")] if (root / "cache").exists() else []
    )
    files = [path for folder in folders for path in folder.iterdir()] + [*root.rglob("decoded.pt")]
    return {path.name: path.read_bytes() for path in files}


def loaded(data: BatchSizeDataModule) -> list[Any]:
    data.prepare_data()
    data.setup("fit")
    sets: list[Any] = [data.train_set, data.val_set]
    return [[str(examples[i]) for i in range(len(examples))] for examples in sets]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


@pytest.mark.quick(make=[of_text], broken=[False])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("make", [of_text, of_pydoc, of_images])
def test_two_at_once(make: Make, broken: bool, root: Path) -> None:
    whole = loaded(make(root))
    right = cached(root)
    for path in (*(root / "cache").rglob("*"), *root.rglob("decoded.pt")) if broken else ():
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-3])
    if not broken:
        for path in (*(root / "cache").rglob("*"), *root.rglob("decoded.pt")):
            if path.is_file():
                path.unlink()
        for path in sorted((root / "cache").glob("*")):
            path.rmdir()
    both = get_context("fork").Barrier(2)

    def work() -> None:
        before(os, "replace", lambda: both.wait(60))  # each has built its own, and neither has moved it to its place
        loaded(make(root))

    ended = [child.end() for child in [Child(work, root / f"printed-{number}") for number in range(2)]]
    assert [end.code for end in ended] == [0, 0], ended
    assert cached(root) == right
    assert not [*(root / "cache").glob(".unfinished*")] and not [*root.rglob("*.tmp")]
    assert loaded(make(root)) == whole


@pytest.mark.quick(make=[of_text], when=["moved"])
@pytest.mark.parametrize("when", ["written", "moved"])
@pytest.mark.parametrize("make", [of_text, of_pydoc, of_images])
def test_one_is_killed(make: Make, when: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere)

    def work() -> None:
        if when == "moved":
            before(os, "replace", kill)
        elif make is of_images:
            before(__import__("torch"), "save", kill)
        else:
            before(Path, "write_text", kill)
        loaded(make(root))

    assert Child(work, root / "printed").end().code == -9
    assert not cached(root)
    assert loaded(make(root)) == loaded(make(elsewhere))
    assert cached(root).keys() == cached(elsewhere).keys()
