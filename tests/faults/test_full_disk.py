"""A disk that becomes full costs nothing that was saved, and with room again the same command goes on, bit for bit.

The system refuses to write because a file would become too large (RLIMIT_FSIZE), or because a file system of the test's own is
full (a tmpfs, which takes root).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer

from harness.children import SMALL, Child, before, limit_files, same, script, train_as, without_figures
from harness.fits import quiet
from lightning_bsl.app import train
from lightning_bsl.app.saving import MetricsLogger
from lightning_bsl.datasets import Digits, TextFolder
from lightning_bsl.models import Classifier, cnn5
from lightning_bsl.population import Grid, Outcome, read_outcomes, run_grid
from lightning_bsl.schedules.files import append_whole, written_whole


def saved(folder: Path) -> dict[str, bytes]:
    """What is in the folder of a run, without its logs."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".hydra" not in path.parts and path.suffix != ".log")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Fault(NamedTuple):
    """What cannot be written, and when the disk becomes full.

    Args:
        file: The file, relative to the folder of the run.
        owner: The class or module that has the function.
        name: The function before which the disk becomes full.
        call: At which of its calls.
        room: How many bytes the file may still grow by; ``None`` for files of 20,000 bytes, which is less than a checkpoint.
    """

    file: str
    owner: Any
    name: str
    call: int = 1
    room: int | None = None


FAULTS = {
    "checkpoint": Fault("checkpoints/epoch=1-step=12.ckpt", Classifier, "on_train_epoch_start", 2),
    "metrics, a row": Fault("metrics.csv", Classifier, "training_step", 11, 30),
    "metrics, another column": Fault("metrics.csv", Classifier, "on_validation_epoch_end", 2, 30),
    "plan": Fault("plan.csv", train.RunRecord, "on_train_start", 1, 0),
    "configuration": Fault(".hydra/run.yaml", train, "open_run", 1, 30),
    "end": Fault("finished.json", train, "finish_run", 1, 4),
    "figure": Fault("curves.png", train, "plot_run", 1, 4),
}


def check(what: str, whole: Path, folder: Path, as_command: bool = False) -> None:
    fault, earlier = FAULTS[what], folder.with_name("before")
    start: Any = (lambda prepare: script("train.py", *SMALL, folder=folder, prepare=prepare)) if as_command else (
        lambda prepare: train_as(SMALL, folder, prepare)
    )  # fmt: skip

    def fill() -> None:
        path = folder / fault.file
        shutil.copytree(folder, earlier)
        limit_files(20_000 if fault.room is None else (path.stat().st_size if path.exists() else 0) + fault.room)

    def prepare() -> None:
        if what != "figure":
            without_figures()
        before(fault.owner, fault.name, fill, fault.call)

    cut = start(prepare).end()
    assert cut.code == 1, cut.text
    assert f"{folder / fault.file} cannot be written (File too large): make room" in cut.text
    assert ("Traceback" in cut.text) != as_command and not (folder / "finished.json").exists()
    there, now = saved(earlier), saved(folder)
    for name in there.keys() - {"metrics.csv"}:
        assert now[name] == there[name], name
    assert now.get("metrics.csv", b"").startswith(there.get("metrics.csv", b""))
    assert now.get(fault.file, b"").endswith(b"\n" if fault.file == "metrics.csv" else b"")
    assert not [*folder.rglob(".unfinished*")]
    for path in (folder / "checkpoints").glob("*.ckpt"):
        torch.load(path, weights_only=True)

    again = start(without_figures).end()
    assert again.code == 0, again.text
    same(folder, whole)


@pytest.mark.quick(what=["checkpoint", "end"])
@pytest.mark.parametrize("what", FAULTS)
def test_of_a_run(what: str, whole_run: Path, tmp_path: Path) -> None:
    check(what, whole_run, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint", "metrics, another column", "configuration", "end"])
def test_of_a_command(what: str, whole_run: Path, tmp_path: Path) -> None:
    check(what, whole_run, tmp_path / "run", as_command=True)


@pytest.mark.parametrize("rows", [[{"a": 1.5}, {"a": 2.5}], [{"a": 1.5}, {"b": 2.5}]], ids=["a row", "another column"])
def test_of_the_metrics(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    def work() -> None:
        logger = MetricsLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
        for step, row in enumerate(rows):
            if step == 1:
                limit_files(os.path.getsize(tmp_path / "metrics.csv") + 3)
            logger.log_metrics(row, step)

    cut = Child(work, tmp_path).end()
    assert cut.code == 1 and f"{tmp_path / 'metrics.csv'} cannot be written (File too large): make room there" in cut.text
    assert (tmp_path / "metrics.csv").read_bytes() == b"a,step\r\n1.5,0\r\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


# --- a grid


def make_classifier(seed: int) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(cnn5(image_size=8, width=4), 10)


def make_trainer() -> Trainer:
    return Trainer(**quiet(max_epochs=-1, precision="64-true"))


def grid(path: Path, jobs: int) -> list[Outcome]:
    """Six replicas, with two targets each; the rates are such that some of them diverge."""
    grid = Grid([16], [0.02, 1e200], seeds=3, targets=[2.25, 2.2], max_examples=160, extra_steps=1, probe=20)
    return run_grid(grid, make_classifier, Digits(), path, make_trainer, jobs=jobs, form="loop")


@pytest.mark.quick(jobs=[1], lines=[3])
@pytest.mark.parametrize("lines", [0, 1, 3, 8])
@pytest.mark.parametrize("jobs", [1, 2])
def test_of_a_grid(jobs: int, lines: int, tmp_path: Path) -> None:
    whole = grid(tmp_path / "whole.csv", 1)
    path = tmp_path / "cut" / "replicas.csv"
    rows = (tmp_path / "whole.csv").read_bytes().splitlines(keepends=True)
    size = sum(map(len, rows[:lines])) + len(rows[0]) // 2

    def work() -> None:
        limit_files(size)
        grid(path, jobs)

    cut = Child(work, tmp_path).end()
    assert cut.code == 1 and f"{path} cannot be written (File too large): make room" in cut.text
    kept = path.read_bytes() if path.exists() else b""
    assert len(kept) <= size and b"".join(rows[:1]).startswith(kept[: len(rows[0])]) and kept[-1:] in (b"", b"\n")
    assert {*kept.splitlines()} <= {row.rstrip() for row in rows}  # whole lines, and right ones
    grid(path, jobs)
    assert sorted(map(str, read_outcomes(path))) == sorted(map(str, whole))
    assert path.read_bytes().startswith(kept)


# --- a token cache


def text(folder: Path, cache: Path) -> TextFolder:
    for number in range(12) if not folder.exists() else ():
        folder.mkdir(exist_ok=True)
        words = " ".join(f"word{number * k % 97}" for k in range(400))
        (folder / f"{number}.txt").write_text(words)
        os.utime(folder / f"{number}.txt", (1e9, 1e9))
    return TextFolder(folder, block_size=8, tokenizer="train", vocab_size=300, cache_dir=cache)


def cached(cache: Path) -> dict[str, bytes]:
    """The files of a cache, by name; the folder may hold nothing else."""
    (folder,) = cache.iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.quick(file=["train.bin"])
@pytest.mark.parametrize("file", ["train.bin", "train_ends.bin", "tokenizer.json", "about.json"])
def test_of_a_token_cache(file: str, tmp_path: Path) -> None:
    text(tmp_path / "text", tmp_path / "whole").prepare_data()
    whole = cached(tmp_path / "whole")
    smaller = [len(content) for content in whole.values() if len(content) < len(whole[file])]
    size = max([*smaller, len(whole[file]) // 2])  # only files from this one's size on do not fit

    def work() -> None:
        limit_files(min(size, len(whole[file]) - 1))
        text(tmp_path / "text", tmp_path / "cache").prepare_data()

    cut = Child(work, tmp_path).end()
    message = f"the tokens cannot be written to {tmp_path / 'cache'} (File too large); make room there, or write `cache_dir`"
    assert cut.code == 1 and message in cut.text, cut.text
    assert not [*(tmp_path / "cache").iterdir()]
    data = text(tmp_path / "text", tmp_path / "cache")
    data.prepare_data()
    data.setup("fit")
    assert cached(tmp_path / "cache") == whole


# --- a file system that is full


def test_of_a_single_file(tmp_path: Path) -> None:
    """``/dev/full`` refuses as a full disk does; a file beside it does not lose what it has."""
    with pytest.raises(OSError, match=r"/dev/full cannot be written .No space left on device.: make room there"):
        append_whole(Path("/dev/full"), b"row\n")
    path = tmp_path / "plan.csv"
    path.write_text("before")
    with pytest.raises(OSError, match=r"plan\.csv cannot be written .No space left on device."), written_whole(path) as other:
        other.symlink_to("/dev/full")
        other.write_text("after")
    with pytest.raises(RuntimeError, match="drawing failed"), written_whole(path) as other:
        other.write_text("half")
        raise RuntimeError("drawing failed")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("plan.csv", "before")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, room: int) -> Path:
    """Leave so many bytes on a disk; returns the file that takes the rest."""
    path = disk / "ballast"
    status = os.statvfs(disk)
    path.write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - room)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 4096, 16384])
def test_of_a_checkpoint_on_a_full_file_system(room: int, disk: Path, whole_run: Path) -> None:
    def prepare() -> None:
        without_figures()
        before(Classifier, "on_train_epoch_start", lambda: fill(disk, room), 2)

    folder = disk / "run"
    cut = train_as(SMALL, folder, prepare).end()
    assert cut.code == 1 and f"{folder}/" in cut.text and "cannot be written (No space left on device)" in cut.text
    assert not [*folder.rglob(".unfinished*")]
    for path in (folder / "checkpoints").glob("*.ckpt"):
        torch.load(path, weights_only=True)
    (disk / "ballast").unlink()
    again = train_as(SMALL, folder).end()
    assert again.code == 0, again.text
    same(folder, whole_run)


@pytest.mark.slow
def test_of_temporary_files(disk: Path, whole_run: Path, tmp_path: Path) -> None:
    """A run does not need the folder for temporary files, which is often a small disk of its own."""

    def prepare() -> None:
        import tempfile

        without_figures()
        tempfile.tempdir = str(disk)
        fill(disk, 0)

    ended = train_as(SMALL, tmp_path / "run", prepare).end()
    assert ended.code == 0, ended.text
    same(tmp_path / "run", whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 4096, 8192])
def test_of_a_token_cache_on_a_full_file_system(room: int, disk: Path, tmp_path: Path) -> None:
    text(tmp_path / "text", tmp_path / "whole").prepare_data()
    fill(disk, room)
    with pytest.raises(OSError, match=r"the tokens cannot be written to .*disk \(No space left on device\); make room there"):
        text(tmp_path / "text", disk).prepare_data()
    (disk / "ballast").unlink()
    assert not [*disk.iterdir()]
    text(tmp_path / "text", disk).prepare_data()
    assert cached(disk) == cached(tmp_path / "whole")
