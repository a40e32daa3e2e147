"""Nothing that is read can run code, write elsewhere, or put markup into a page."""

from __future__ import annotations

import ast
import csv
import io
import os
import pickle
import re
import shlex
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from harness.broken import CIFAR10, FashionMNIST, cifar10, jpeg, loaded, put, tiny_imagenet
from harness.commands import Run
from harness.files import ROOT, csv_rows
from harness.runs import write_run
from lightning_bsl.app import report, surge_report
from lightning_bsl.app.branch import load
from lightning_bsl.runs import find_runs, group_runs


class Harm:
    """Unpickled by Python as it is, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def harmed(tmp_path: Path) -> Path:
    """What a malicious file would make; at the end it must not be there."""
    path = tmp_path / "harmed"
    pickle.loads(pickle.dumps(Harm(path)))  # it would indeed
    path.rmdir()
    return path


# --- checkpoints

TRAIN = ("+model.net.width=4", "data.samples_per_epoch=64", "trainer.enable_progress_bar=false")


def poisoned(checkpoint: Path, harm: Path) -> None:
    """Put a call into a checkpoint, which is whole in all else."""
    torch.save(torch.load(checkpoint, weights_only=True) | {"harm": Harm(harm)}, checkpoint)
    pickle_of = torch.load(checkpoint, weights_only=False)  # it would indeed
    assert pickle_of["harm"] is None and harm.is_dir()
    harm.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the run goes on", "ckpt_path", "PyTorch told to trust"])
def test_a_checkpoint_runs_no_code_where_a_run_is_resumed(
    how: str, run: Run, tmp_path: Path, harmed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    run("train.py", *TRAIN, "trainer.max_epochs=1", folder=folder)
    (folder / "finished.json").unlink()
    poisoned(folder / "checkpoints" / "last.ckpt", harmed)
    if how == "PyTorch told to trust":  # what PyTorch before 2.6 does without being told
        monkeypatch.setattr("torch.load", _trusting(torch.load))
    overrides = [f"ckpt_path={folder}/checkpoints/last.ckpt"] if how == "ckpt_path" else []
    said = run("train.py", *TRAIN, "trainer.max_epochs=1", *overrides, folder=folder, fails=True)
    assert not harmed.exists()
    assert "last.ckpt" in said.both


def _trusting(real: Any) -> Any:
    """`torch.load` with the default that it had before PyTorch 2.6."""

    def trusting(*arguments: Any, weights_only: bool | None = None, **options: Any) -> Any:
        return real(*arguments, weights_only=bool(weights_only), **options)

    return trusting


def test_a_checkpoint_runs_no_code_where_branches_begin(tmp_path: Path, harmed: Path) -> None:
    torch.save({"callbacks": Harm(harmed), "optimizer_states": [], "loops": {}, "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be read as a checkpoint"):
        load(tmp_path / "a.ckpt")
    assert not harmed.exists()


# --- data

NUMPY = "numpy.core.multiarray"


@pytest.mark.parametrize("place", ["alone", "beside the images", "in the labels", "as an array"])
def test_a_pickle_of_images_runs_no_code(place: str, tmp_path: Path, harmed: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    cifar10(folder)
    path = folder / "cifar-10-batches-py" / "data_batch_2"
    whole, harm = pickle.loads(path.read_bytes()), Harm(harmed)
    array = np.empty(1, object)
    array[0] = harm
    entry: dict[str, Any] = {
        "alone": harm,
        "beside the images": whole | {"more": harm},
        "in the labels": whole | {"labels": [0, 1, 2, harm]},
        "as an array": whole | {"data": array},
    }
    path.write_bytes(pickle.dumps(entry[place], protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_2 cannot be read \(it wants to call .*mkdir.*do not trust this file"):
        loaded("cifar10", folder)
    assert not harmed.exists()


@pytest.mark.parametrize("name", ["numpy.ndarray", "numpy.dtype", f"{NUMPY}._reconstruct", "_codecs.encode", "builtins.bytes"])
def test_no_function_of_numpy_or_python_is_reached_by_a_pickle(name: str) -> None:
    """An array of a type of objects would be made of addresses in memory that the file chooses."""
    from lightning_bsl.datasets.image.cifar import _ArraysOnly

    module, _, function = name.rpartition(".")
    found = _ArraysOnly(io.BytesIO()).find_class(module, function)
    assert found.__module__ == "lightning_bsl.datasets.image.cifar"


def test_an_image_runs_no_program(tmp_path: Path, harmed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would let Ghostscript draw PostScript, whatever the name of the file says."""
    gs = tmp_path / "bin" / "gs"
    put("gs", f"#!/bin/sh\nmkdir {harmed}\n")(gs.parent)
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(gs.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    folder = tmp_path / "data"
    tiny_imagenet(folder)
    file = folder / "train/n01/images/n01_0.JPEG"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(file) as image, pytest.raises(Exception):  # noqa: B017
        image.load()
    assert harmed.is_dir()  # it would indeed
    harmed.rmdir()
    with pytest.raises(ValueError, match=r"n01_0\.JPEG cannot be read"):
        loaded("tiny_imagenet", folder)
    assert not harmed.exists()


def test_the_cache_of_images_runs_no_code(tmp_path: Path, harmed: Path) -> None:
    folder = tmp_path / "data"
    tiny_imagenet(folder)
    jpeg("train/n01/images/n01_9.JPEG")(folder)
    torch.save({"fingerprint": Harm(harmed)}, folder / "decoded.pt")
    loaded("tiny_imagenet", folder)
    assert not harmed.exists()


@pytest.mark.parametrize("kind, archive", [(CIFAR10, "cifar-10-python.tar.gz"), (FashionMNIST, "FashionMNIST/raw/x.gz")])
def test_an_archive_that_is_not_the_published_one_is_not_unpacked(
    kind: Any, archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its members could lie anywhere: ``../``, or an absolute path."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)
    put("evil.txt", "evil")(tmp_path)
    (tmp_path / "data" / archive).parent.mkdir(parents=True)
    with tarfile.open(tmp_path / "data" / archive, "w:gz") as tar:
        tar.add(tmp_path / "evil.txt", "../outside.txt")
        tar.add(tmp_path / "evil.txt", str(tmp_path / "absolute.txt"))
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        kind(tmp_path / "data", batch_size=4, download=True).prepare_data()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "evil.txt"]


# --- folders of runs

EVIL = "<script>alert(1)</script>"
ODD_NAMES = [
    EVIL,
    '"><img src=x onerror=alert(1)>',
    "'-alert(1)-'",
    "</title><b>",
    "{{7*7}}",
    "a$b$\\frac{",
    "a\nb\x1b[31m",
    "&lt;",
]


class Tags(HTMLParser):
    """The tags of a page with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def check_page(text: str) -> Tags:
    """A page has its own script alone, links to nothing, and fetches nothing."""
    tags = Tags(text)
    names = [name for name, _ in tags.tags]
    script = (ROOT / "lightning_bsl/report/templates/page.js").read_text()
    assert names.count("script") == 1
    assert script.strip() in "".join(tags.scripts)
    assert "alert(1)" not in "".join(tags.scripts)
    assert not {"iframe", "object", "embed", "base", "link", "form", "a"} & set(names)
    for name, attributes in tags.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "srcset", "action")], attributes
        if "src" in attributes:
            assert name == "img" and str(attributes["src"]).startswith("data:image/png;base64,")
    return tags


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bsl.report.page.plot_groups", lambda *_: [])


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.slow
def test_names_are_text_in_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of folders, of groups, of metrics, values of overrides, and what is said of files that are broken."""
    root = tmp_path / "runs"
    for number, name in enumerate(ODD_NAMES):
        place = name.replace("/", "\u2215")
        write_run(root / f"of others {place}", ours=False)
        write_run(root / f"ours {place}", [f"scheduler={name.replace('=', '')}", f"seed={number}"])
        write_run(root / f"broken {place}")
        put("metrics.csv", f"step,samples,{EVIL}\n1,2,{EVIL}\n")(root / f"broken {place}")
        put("plan.csv", f"{EVIL}\n")(root / f"of others {place}")
    os.rename(root / "of others &lt;", os.path.join(os.fsencode(root), b"of others \xff"))
    report.main([str(root)])
    text = (root / "report" / "report.html").read_text(encoding="utf-8")
    check_page(text)
    assert text.count("&lt;script&gt;alert(1)") >= 3
    assert "{{7*7}}" in text  # and not 49
    said = capsys.readouterr().out
    assert "\x1b" not in said and len(said.splitlines()) == 2  # no name speaks to the terminal
    groups = {row["group"] for row in csv_rows(root / "report" / "report.csv")}
    assert groups == {group.name for group in group_runs(find_runs([root], progress=False).runs)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


@pytest.mark.slow
def test_names_are_no_formulas_in_a_figure(tmp_path: Path) -> None:
    """matplotlib takes what stands between dollars for a formula, and fails at one that is none."""
    for number, name in enumerate(("a$b$", "$\\frac{$", "$", "<tspan>")):
        write_run(tmp_path / str(number), [f"scheduler={name}"], [2, 1], [10, 10])
    report.main([str(tmp_path)])
    text = (tmp_path / "report" / "report.html").read_text()
    assert len([name for name, _ in check_page(text).tags if name == "img"]) >= 4


def test_the_templates_escape_and_mark_nothing_as_safe_but_their_own_markup() -> None:
    marked = []
    for path in sorted((ROOT / "lightning_bsl/report/templates").iterdir()):
        text = path.read_text()
        marked += re.findall(r"\{\{[^{}]*\|\s*safe[^{}]*\}\}", text)
        assert "autoescape" not in text
    for some in marked:  # what is marked as safe is a constant
        assert all(re.fullmatch(r"""(['"]).*\1""", part.strip()) for part in re.findall(r"([^{|;]+?)\|safe", some)), some


def test_a_command_in_a_report_is_quoted(tmp_path: Path) -> None:
    """It is there to be copied into a shell: what a grid's folder says stays one word."""
    put(".hydra/hydra.yaml", "hydra: {runtime: {choices: {data: digits, model: resnet18}}}")(tmp_path)
    put(".hydra/config.yaml", "data: {root: '$(touch harmed); `x` & \"'}\nmodel: {_target_: os.system}\n")(tmp_path)
    overrides = surge_report.train_overrides(tmp_path)
    assert any("touch harmed" in override for override in overrides)
    assert shlex.split(shlex.join(overrides)) == overrides
    assert not (tmp_path / "harmed").exists()


@pytest.mark.usefixtures("quick_figures")
def test_a_configuration_is_read_and_not_instantiated(tmp_path: Path, harmed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "do not tell")
    call = f"{{_target_: os.mkdir, path: {harmed}, _args_: ['{harmed}']}}"
    config = f"seed: 0\nckpt_path: null\nmodel: {call}\noptimizer: {{lr: {call}}}\ntrainer: {{max_epochs: {call}}}\n"
    config += "x: '${oc.env:SECRET}'\n"
    hydra = "hydra: {runtime: {choices: {scheduler: constant}, cwd: .}, searchpath: ['file:///'], callbacks: " + call + "}\n"
    overrides = "- optimizer.lr=1\n- x=2\n- model=3\n"
    for number, tags in enumerate(("", f"y: !!python/object/apply:os.mkdir ['{harmed}']\n", "y: !!python/name:os.system\n")):
        folder = write_run(tmp_path / "runs" / str(number), epochs=9)
        put(".hydra/config.yaml", config + tags)(folder)
        put(".hydra/hydra.yaml", hydra)(folder)
        put(".hydra/overrides.yaml", overrides)(folder)
    report.main([str(tmp_path / "runs")])
    text = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert "could not determine a constructor for the tag" in text
    assert "do not tell" not in text and "oc.env:SECRET" not in text.partition("<body>")[0]
    surge_report.train_overrides(tmp_path / "runs" / "0")
    surge_report.train_overrides(tmp_path / "runs" / "1")
    assert not harmed.exists()


@pytest.mark.usefixtures("quick_figures")
def test_names_lead_nowhere(tmp_path: Path) -> None:
    """A metric, a group or a checkpoint by the name of a path is no path that is written to."""
    folder = write_run(tmp_path / "runs" / "0", ["scheduler=../../../outside", "seed=0"])
    rows = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(rows.replace("val/loss", "../../outside,val/loss", 1).replace("0.1,", "0.1,1,"))
    other = write_run(tmp_path / "runs" / "1", ["ckpt_path=../../../outside.ckpt"])
    (other / "checkpoints").mkdir()
    (other / "checkpoints" / "..\\outside.ckpt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    report.main([str(tmp_path / "runs")])
    written = {path.relative_to(tmp_path / "runs" / "report").as_posix() for path in set(tmp_path.rglob("*")) - set(before)}
    assert written == {".", "report.html", "report.csv"}


@pytest.mark.usefixtures("quick_figures")
def test_names_are_quoted_in_csv(tmp_path: Path) -> None:
    for number, name in enumerate(('a,b"c', "d;e", "x\ny")):
        write_run(tmp_path / str(number), [f"scheduler={name}"])
    report.main([str(tmp_path)])
    with open(tmp_path / "report" / "report.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert {row[1] for row in rows[1:]} == {'a,b"c', "d;e", "x\\ny"}


# --- the source

READS = {
    "torch.load": lambda call: _says(call, "weights_only", True),
    "np.load": lambda call: _says(call, "allow_pickle", False),
    "yaml.load": lambda call: False,
    "yaml.unsafe_load": lambda call: False,
    "yaml.full_load": lambda call: False,
    "pickle.load": lambda call: False,
    "eval": lambda call: ast.unparse(call.args[0]) == "annotation",  # of a function, as its author wrote it
    "exec": lambda call: False,
    "os.system": lambda call: False,
}


def _says(call: ast.Call, name: str, value: bool) -> bool:
    return any(
        word.arg == name and isinstance(word.value, ast.Constant) and word.value.value is value for word in call.keywords
    )


def test_the_source_reads_nothing_that_can_run_code() -> None:
    wrong, seen = [], set()
    for path in sorted((ROOT / "lightning_bsl").rglob("*.py")):
        text = path.read_text()
        assert "trust_remote_code" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in READS:
                seen.add(name)
                if not READS[name](node):
                    wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong
    assert "torch.load" in seen  # so the search finds what there is
