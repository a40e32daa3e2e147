"""The rules for splits, against those of the library `datasets` on the same folders."""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePath

import pytest
from datasets.data_files import DataFilesDict, get_data_patterns
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bsl.datasets.text.splits import split_files

OURS = {"train": "train", "validation": "val", "test": "test"}


def of_datasets(names: list[str], folder: Path) -> dict[str, set[str]]:
    """The splits of each file as `datasets` has it; it may put a file into several."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    base = str(folder)
    splits: dict[str, set[str]] = {}
    for split, files in DataFilesDict.from_local_or_remote(get_data_patterns(base), base_path=base).items():
        for file in files:
            splits.setdefault(Path(file).relative_to(folder.resolve()).as_posix(), set()).add(OURS.get(split, split))
    return splits


def check(names: list[str], folder: Path) -> dict[str, set[str]]:
    expected = of_datasets(names, folder)
    if any(len(splits) > 1 for splits in expected.values()):
        with pytest.raises(ValueError, match="says two splits"):
            split_files(list(map(PurePath, names)))
    else:
        splits = split_files(list(map(PurePath, names)))
        assert {path.as_posix(): {split} for path, split in splits.items()} == expected
    return expected


@pytest.mark.parametrize("train, val, test, left_out", [
    ("a.txt b/c.txt", "", "", ""),
    ("train.txt", "dev.txt", "testing.jsonl", ""),
    ("training.txt", "valid.txt", "evaluation.txt", ""),
    ("train/a.txt", "", "testing/a.txt evaluation/b.txt", ""),
    ("train/a.txt", "validation1/a.txt validation-2/a.txt", "", ""),
    ("my.train.txt", "my_val_2.txt", "my-test.txt eval9.txt", ""),
    ("constrained.txt contest.txt medieval.txt developer.txt", "", "", ""),
    ("trained.txt tests.txt values.txt", "", "", ""),
    ("train/test.txt train/a.txt", "", "", "val.txt"),  # folders before files
    ("train.txt", "", "test.txt", "notes.txt"),  # what says nothing is left out
    ("", "val/a.txt", "", "notes.txt"),
    ("deep/er/train/x/a.txt", "", "deep/er/test/x/a.txt", ""),
    ("data/train-00000-of-00001.txt", "", "data/test-00000-of-00001.txt", ""),
    ("data/train-00000-of-00001-ab12.txt", "", "", "test/a.txt"),  # shards before folders
    ("train-00000-of-00001.txt", "x/validation-00000-of-00001.txt", "", ""),
    ("(train).txt [test].txt train", "", "", ""),
])  # fmt: skip
def test_as_datasets_has_it(train: str, val: str, test: str, left_out: str, tmp_path: Path) -> None:
    expected = {"train": train.split(), "val": val.split(), "test": test.split()}
    splits = check([*train.split(), *val.split(), *test.split(), *left_out.split()], tmp_path)
    assert splits == {name: {split} for split, names in expected.items() for name in names}


WORDS = st.sampled_from(
    ["train", "training", "validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation", "x", "books"]
)
PART = st.lists(WORDS, min_size=1, max_size=2).flatmap(
    lambda words: st.sampled_from(["-", ".", "_", " ", "0", "", "+", "~"]).map(lambda between: between.join(words))
)
NAME = st.tuples(st.lists(PART, max_size=2), PART).map(
    lambda parts: "/".join([*(f"{part}-f" for part in parts[0]), f"{parts[1]}.txt"])
)


@given(st.lists(NAME, min_size=1, max_size=4, unique=True))
@settings(max_examples=40, deadline=None)
def test_as_datasets_has_it_for_any_names(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(names, Path(folder))


@pytest.mark.parametrize(
    "name, split", [("Test.TXT", "test"), ("TRAIN/a.txt", "train"), ("my-Dev.txt", "val"), ("a\nb_test.txt", "test")]
)
def test_capitals_count_as_small_letters(name: str, split: str) -> None:
    """`datasets` would train on all of these."""
    assert split_files([PurePath(name)]) == {PurePath(name): split}


@pytest.mark.parametrize(
    "name", ["train_test.txt", "test-val/a.txt", "corpus_train/val/a.txt", "data/dev_train-00000-of-00001.txt"]
)
def test_two_splits_at_once(name: str) -> None:
    """`datasets` would put some of these into both."""
    with pytest.raises(ValueError, match=r"says two splits, .* and .*; rename the file or its folder.*data.root=DIR"):
        split_files([PurePath(name)])
