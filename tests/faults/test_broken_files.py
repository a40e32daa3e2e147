"""Files that nobody means to have: each is read as if it were whole, or refused with its name and a remedy.

`harness.broken` makes them. The folders that people do have are in ``tests/datasets/test_broken_folders.py``.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.broken import (
    ANY,
    DATA_SETS,
    FORMATS,
    MUTANTS,
    NOBODY,
    OTHER_BYTES,
    PLACES,
    Mutant,
    as_nobody,
    changed,
    contents,
    guarded,
    in_place,
    names_in,
    put,
)
from harness.configs import compose_config
from harness.files import flat
from harness.runs import write_run
from lightning_bsl.app import report, surge_report
from lightning_bsl.app.train import train
from lightning_bsl.population import Outcome
from lightning_bsl.report.markup import Figure

REMEDY = r"[;:.] .*\b(remove|bring|unpack|convert|correct|move|give|write|put|run|rename|download)\b"
OF_LIMITS = r"MemoryError|[Uu]nable to allocate|\[Errno"  # what the guard would say, or the system


class Good:
    """The good folder of each format, and what is read from it."""

    def __init__(self, root: Path) -> None:
        self.root, self._read = root, dict[str, Any]()

    def copy(self, name: str, folder: Path) -> Path:
        """A copy of a good folder, at the times of the first one."""
        whole = self.root / name / "data"
        if not whole.exists():
            whole.mkdir(parents=True)
            FORMATS[name].write(whole)
        shutil.copytree(whole, folder, symlinks=True)
        return folder

    def contents(self, name: str) -> Any:
        """What is read from it."""
        if name not in self._read:
            self._read[name] = contents(name, self.copy(name, self.root / name / "read" / "data"))
        return self._read[name]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"))


def check_refusal(said: str, name: str) -> None:
    """A message names the file, as it can be printed, and says what to do; it says nothing of a library's limits."""
    assert name in said or ascii(name)[1:-1] in said, said
    assert re.search(REMEDY, said, re.S), said
    assert not re.search(OF_LIMITS, said.partition("web page")[0]), said


BLANK = {f"txt: 03.txt: {how}" for how in ("empty", "a line break")}  # such documents do not count
QUICK = [
    "idx: train-images-idx3-ubyte: 4 billion records",
    "idx: t10k-labels-idx1-ubyte: a pipe",
    "cifar10: data_batch_3: a memo of 2 billion",
    "cifar10: data_batch_3: pointers in an array",
    "cifar10: data_batch_3: pointers in a buffer",
    "cifar10: data_batch_3: labels that are true",
    "tiny: n01_0.JPEG: a folder",
    "tiny: n01_0.JPEG: PostScript",
    "tiny: decoded.pt: a cache that is a pipe",
    "tiny: decoded.pt: a cache that is a folder",
    "tiny: val_0.JPEG: an image twice under one name",
    "jsonl: train.jsonl: a folder",
    "jsonl: train.jsonl: packed beside it",
    "json: train.json: deep cut short",
    "jsonl gzip: train.jsonl.gz: garbage behind it",
    "parquet: train.parquet: a name with no UTF-8",
    "parquet: train.parquet: a footer of 2 GiB",
    "vocabulary: merges.txt: empty",
    "cache: about.json: a pipe",
    "cache: val_ends.bin: a pipe",
]


@pytest.mark.quick(mutant=QUICK)
@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_a_file_is_whole_or_refused(mutant: str, good: Good, tmp_path: Path) -> None:
    of = MUTANTS[mutant]
    folder, whole = good.copy(of.format, tmp_path / "data"), good.contents(of.format)
    of.change(folder)
    before = names_in(folder)
    try:
        with guarded():
            read = contents(of.format, folder)
    except (ValueError, OSError) as error:
        check_refusal(str(error), of.file.rpartition("/")[2])
        assert names_in(folder) == before
        return
    if mutant in BLANK:
        assert read == [document for document in whole if "number 3:" not in document[1] or document[0] != "train"]
    else:
        assert read == whole or OTHER_BYTES in mutant


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 300
    assert {of.format for of in MUTANTS.values()} == set(FORMATS)


# --- what root may read, and nobody else


@pytest.fixture
def of_nobody() -> Iterator[Path]:
    """A folder that somebody who is not root can reach."""
    folder = Path(tempfile.mkdtemp())
    if not os.access(folder.parent, os.X_OK) or (folder.parent.stat().st_mode & 0o005) != 0o005:
        pytest.skip(f"nobody but its owner may enter {folder.parent}")
    yield folder
    shutil.rmtree(folder)


PERMISSIONS = {"a file": 0, "no listing": 0o300, "no entry": 0o600, "the folder of all": 0}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork is needed to be somebody else")
@pytest.mark.quick(name=["idx"], what=["a file", "no entry"])
@pytest.mark.quick(name=["tokenizer"], what=["a file"])
@pytest.mark.quick(name=["eli5"], what=["the folder of all"])
@pytest.mark.parametrize("what", list(PERMISSIONS))
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "cache"])
def test_what_may_not_be_read_is_named(name: str, what: str, good: Good, of_nobody: Path) -> None:
    whole, folder = good.contents(name), good.copy(name, of_nobody / "data")  # which also imports what the fork needs
    file = folder / FORMATS[name].files[0]
    closed = {"a file": file, "the folder of all": folder}.get(what, file.parent)
    closed.chmod(PERMISSIONS[what])
    if os.geteuid() == 0:
        for path in (of_nobody, *of_nobody.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    said = as_nobody(lambda: "whole" if contents(name, folder) == whole else "something else")
    if said != "whole" or what != "no listing":
        assert re.fullmatch(rf"PermissionError {folder}\S* cannot be read \(.*ermission denied\): give .*chmod.*", said), said
    for path in of_nobody.rglob("*"):
        path.chmod(0o700)


# --- by the way that `bsl-train` goes

TRAINED = [mutant for mutant in MUTANTS.values() if mutant.format in ("idx", "cifar10", "tiny", "jsonl", "eli5")][::17]
OF = {"idx": "fashion_mnist", "tiny": "tiny_imagenet", "jsonl": "text"}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", TRAINED, ids=str)
def test_bsl_train_refuses_before_the_first_step(mutant: Mutant, good: Good, tmp_path: Path) -> None:
    data = OF.get(mutant.format, mutant.format)
    folder = good.copy(mutant.format, tmp_path / "data")
    mutant.change(folder)
    cfg = compose_config(f"data={data}", *DATA_SETS[data].overrides)
    cfg.data.root, cfg.output_dir = str(folder), str(tmp_path / "run")
    if "cache_dir" in cfg.data:
        cfg.data.cache_dir = str(tmp_path / "cache")
    try:
        with guarded():
            read = contents(mutant.format, folder)
    except (ValueError, OSError) as refusal:
        with guarded(), pytest.raises(type(refusal)) as error:
            train(cfg)
        assert str(error.value) == str(refusal)
        written = flat(names_in(tmp_path / name) for name in ("run", "cache"))
        assert not [name for name in written if name.endswith(("plan.csv", "metrics.csv", ".ckpt")) or "unfinished" in name]
    else:
        assert read == good.contents(mutant.format) or OTHER_BYTES in str(mutant)


# --- folders of runs


def write_runs(root: Path) -> None:
    """Three runs of `bsl-train`, the last one resumed, and the event files of somebody else."""
    from torch.utils.tensorboard import SummaryWriter

    for seed in range(3):
        folder = write_run(root / str(seed), [f"seed={seed}", "scheduler=increasing_both"])
        put("bound.csv", "samples,bound\n100,5\n200,4\n")(folder)
        put("critical_batches.csv", "samples,batch_size,critical,low,high,at_least\n100,10,64,32,128,False\n")(folder)
        put("finished.json", '{"value": 1}')(folder)
    shutil.copy(root / "2/metrics.csv", root / "2/metrics.before.csv")
    with SummaryWriter(str(root / "tb")) as writer:
        for step in range(4):
            writer.add_scalar("samples", 100 * (step + 1), step)
            writer.add_scalar("val/loss", 1 / (step + 1), step)
    next((root / "tb").glob("*tfevents*")).rename(root / EVENTS)


def _of_rows(change: Callable[[bytes], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """A change of the rows of a table, not of its header."""

    def changed(data: bytes, draw: random.Random) -> bytes:
        header, _, rows = data.partition(b"\n")
        return header + b"\n" + change(rows)

    return changed


def _of_header(old: bytes, new: bytes) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, draw: data.replace(old, new, 1)


EVENTS = "tb/events.out.tfevents.1.a.0"
OF_TABLES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "no header": lambda data, draw: b"1,2,3\n4,5,6\n",
    "header alone": lambda data, draw: data.partition(b"\n")[0] + b"\n",
    "no step": _of_header(b"step", b"stop"),
    "no samples": _of_header(b"samples", b"sample"),
    "text": _of_rows(lambda rows: rows.replace(b",", b",abc", 3)),
    "infinite": _of_rows(lambda rows: re.sub(rb",[\d.]+", b",inf", rows)),
    "not a number": _of_rows(lambda rows: re.sub(rb",[\d.]+", b",nan", rows)),
    "huge": _of_rows(lambda rows: re.sub(rb"\d+\.\d+", b"1e308", rows)),
    "huge samples": _of_rows(lambda rows: rows.replace(b"00,", b"0" * 300 + b",")),
    "tiny": _of_rows(lambda rows: re.sub(rb"\d+\.\d+", b"1e-320", rows)),
    "a step of 30 digits": _of_rows(lambda rows: re.sub(rb"^(\d+),\d+", rb"\1," + b"9" * 30, rows, flags=re.M)),
    "more fields": _of_rows(lambda rows: rows.replace(b"\n", b",1,2,3\n")),
    "an open quote": _of_rows(lambda rows: b'"' + rows),
    "semicolons": lambda data, draw: data.replace(b",", b";"),
    "columns by our names": lambda data, draw: data.replace(b"lr", b"row,metric,value,part,time,lr", 1).replace(
        b"0.1,", b"1,2,3,4,5,0.1,"
    ),
    "superscripts": _of_rows(lambda rows: rows.replace(b",", ",²".encode())),
    "a column that is a path": _of_header(b"val/loss", b"../../../../loss"),
    "steps that go back": _of_rows(lambda rows: b"".join(reversed(rows.splitlines(keepends=True)))),
    "utf-16": lambda data, draw: data.decode().encode("utf-16"),
    "gzip": lambda data, draw: gzip.compress(data),
}
OF_YAML: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a call": lambda data, draw: b"a: !!python/object/apply:os.system ['touch harmed']\n" + data,
    "a name": lambda data, draw: b"seed: !!python/name:os.system\n",
    "a list": lambda data, draw: b"- a\n- b\n",
    "a mapping": lambda data, draw: b"a: 1\n",
    "a word": lambda data, draw: b"word\n",
    "a number": lambda data, draw: b"3\n",
    "null": lambda data, draw: b"null\n",
    "a billion of aliases": lambda data, draw: (
        b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 10))
    ),
    "a circle": lambda data, draw: b"a: &a {b: *a}\n",
    "deep": lambda data, draw: b"a: " + b"[" * 1000 + b"]" * 1000,
    "a key twice": lambda data, draw: data + b"\n" + data,
    "two documents": lambda data, draw: data + b"---\n" + data,
    "interpolations of nothing": lambda data, draw: data.replace(b"max_epochs: 4", b"max_epochs: ${nope}").replace(
        b"increasing_both", b"${nope}"
    ),
    "an interpolation of itself": _of_header(b"max_epochs: 4", b"max_epochs: ${trainer.max_epochs}"),
    "half an interpolation": lambda data, draw: data.replace(b"max_epochs: 4", b"max_epochs: '${a'").replace(
        b"increasing_both", b"'${a'"
    ),
    "a list for the seed": _of_header(b"seed: 2", b"seed: [1]"),
    "a seed of many digits": _of_header(b"seed: 2", b"seed: " + b"9" * 400),
    "a path with a byte of code 0": _of_header(b"ckpt_path: null", b'ckpt_path: "a\\0b"'),
    "a number for a path": _of_header(b"ckpt_path: null", b"ckpt_path: 3"),
    "a long path": _of_header(b"ckpt_path: null", b"ckpt_path: " + b"a" * 9000),
    "odd keys": lambda data, draw: data + b"1: 2\nnull: 3\ntrue: 4\n",
    "odd overrides": lambda data, draw: b"- 'a..b=1'\n- '[=2'\n- 'x[0]=3'\n- '=4'\n- '${a}=1'\n- 5\n- null\n- [1]\n",
    "odd choices": lambda data, draw: b"hydra: {runtime: {choices: {scheduler: {a: 1}, 3: [4]}, cwd: [5]}}\n",
    "choices that are a list": lambda data, draw: b"hydra: {runtime: {choices: [1, 2], cwd: 3}}\n",
    "half a character": _of_header(b"increasing_both", b'"\\ud800"'),
    "a formula": _of_header(b"increasing_both", b"'$\\frac{$'"),
}
OF_EVENTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a record of an exabyte": lambda data, draw: b"\xff" * 8 + data[8:],
    "twice": lambda data, draw: data + data,
    "other bytes": lambda data, draw: data[:60] + b"\0\1\2" + data[63:],
}
TABLES = ("2/metrics.csv", "2/metrics.before.csv", "2/plan.csv", "0/bound.csv", "2/critical_batches.csv")
OF_RUNS = (
    dict.fromkeys(TABLES, OF_TABLES)
    | {f"2/.hydra/{name}.yaml": OF_YAML for name in ("config", "hydra", "overrides")}
    | {EVENTS: OF_EVENTS, "2/finished.json": {}}
)
RUN_MUTANTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    f"{file}: {how}": (file, change)
    for file, own in OF_RUNS.items()
    for how, change in (
        {how: changed(new, file, f"{file} {how}") for how, new in (ANY | own).items()}
        | {how: in_place(make, file) for how, make in PLACES.items()}
    ).items()
}
# What is of the right form may say anything: a table that ends early or has other numbers, a configuration of somebody else's.
# A run that was resumed has two tables, of which one may be empty.
SAYS_ANYTHING = re.compile(
    r".*(cut short.*|no samples|huge.*|tiny|infinite|not a number|more fields|steps that go back|a mapping|other bytes|twice)"
    r"|.*: (text|columns by our names|a column that is a path|no step|an open quote)"
    r"|2/metrics\S+: (empty|zeros|a line break|no header|header alone|a link.*|links.*)|tb/.*|2/finished.json.*"
    r"|2/\.hydra.*: (a .*|null|odd.*|.*interpolation.*|half a character|permuted.*)"
)
EMPTY = Figure(Path(os.devnull), "critical_batch", "samples", "")
NAMED = "<p class=.warn.>(.*?)</p>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Good runs, and the page about them."""
    root = tmp_path_factory.mktemp("runs") / "data"
    write_runs(root)
    return root, page(root)


def page(root: Path) -> str:
    """What `bsl-report` writes of runs; its figures are empty, but for those of numbers that a figure may not bear."""
    report.main([str(root), "--out", str(root.parent / "report")])
    return (root.parent / "report" / "report.html").read_text(encoding="utf-8")


QUICK_RUNS = [
    "2/metrics.csv: a step of 30 digits",
    "2/metrics.before.csv: a pipe",
    "2/plan.csv: a pipe",
    "2/plan.csv: empty",
    "0/bound.csv: random bytes",
    "2/critical_batches.csv: a folder",
    "2/.hydra/config.yaml: a call",
    "2/.hydra/config.yaml: a billion of aliases",
    "2/.hydra/config.yaml: a path with a byte of code 0",
    "2/.hydra/hydra.yaml: zeros",
    "2/.hydra/overrides.yaml: a name",
    EVENTS + ": a record of an exabyte",
    EVENTS + ": a pipe",
]


@pytest.mark.quick(mutant=QUICK_RUNS)
@pytest.mark.parametrize("mutant", list(RUN_MUTANTS))
def test_a_report_names_the_file_and_goes_on(
    mutant: str, runs: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (good, whole), (file, change) = runs, RUN_MUTANTS[mutant]
    drawn = bool(re.search("huge|tiny|infinite|not a number|a formula|columns|path$", mutant))
    if not drawn:
        monkeypatch.setattr("lightning_bsl.report.page.plot_groups", lambda *_: [])
        monkeypatch.setattr("lightning_bsl.report.page.plot_critical_batches", lambda *_: EMPTY)
    shutil.copytree(good, tmp_path / "data")
    change(tmp_path / "data")
    with guarded():
        said = page(tmp_path / "data")
    if SAYS_ANYTHING.fullmatch(mutant):
        return
    warnings = " ".join(re.findall(NAMED, said, re.S))
    shown = re.sub("<img[^>]*>", "", said) == re.sub("<img[^>]*>", "", whole)
    assert shown or Path(file).name in warnings, warnings


def test_a_report_of_nothing_that_can_be_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "0")
    (tmp_path / "0/metrics.csv").write_bytes(random.Random(0).randbytes(1000))
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"no run with a log under .*0: metrics.csv is no table of metrics .*; remove it, or bring it again", said)


@pytest.mark.parametrize("how", ["empty", "random bytes", "zeros", "no header", "text", "huge", "not a number", "utf-16"])
def test_a_report_of_a_grid_is_refused_in_one_sentence(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or written: a grid of which some lines can be read is one that is not finished."""
    header = ",".join(Outcome._fields)
    rows = [f"{seed},{size},0.1,0.5,reached,{100 // size},100,0.49,10,0.1" for size in (4, 8, 16) for seed in range(2)]
    data = "\n".join([header, *rows, ""]).encode()
    (tmp_path / "replicas.csv").write_bytes((ANY | OF_TABLES)[how](data, random.Random(how)))
    with guarded():
        try:
            surge_report.main([str(tmp_path)])
        except SystemExit:
            said = capsys.readouterr().err.splitlines()[-1]
            assert "replicas.csv" in said, said
        else:
            assert (tmp_path / "report/surge.html").is_file()
