"""Which split a file belongs to, by the rules of the library `datasets` for the names of files and folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Literal

from lightning_bsl.datasets.files import listing

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_KEYWORDS: dict[Split, str] = {
    "train": "train|training",
    "val": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_BEFORE, _BEHIND = r"(?:.*[-._ 0-9])?", r"[-._ 0-9].*"  # a keyword stands alone, or between these characters
_IN_FILE = {split: re.compile(f"{_BEFORE}(?:{words}){_BEHIND}", re.I | re.S) for split, words in _KEYWORDS.items()}
_IN_FOLDER = {split: re.compile(f"{_BEFORE}(?:{words})(?:{_BEHIND})?", re.I | re.S) for split, words in _KEYWORDS.items()}
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}.*\..*", re.S)


def split_files(paths: Sequence[PurePath]) -> dict[PurePath, Split]:
    """Tell the split of each file, as `datasets.load_dataset(folder)` does.

    The first of these rules that puts any file into a split holds for all files:

    1. In the folder ``data``, names like ``train-00000-of-00001.parquet`` say the split.
    2. The names of folders say it: ``train`` and ``training``; ``validation``, ``valid``, ``dev`` and ``val``; ``test``,
       ``testing``, ``eval`` and ``evaluation``; alone, or parted from the rest of a name by one of ``-._``, a space or a digit.
    3. The names of files say it, by the same words.
    4. All files are of the training split.

    Files that rule 1, 2 or 3 leaves out are in no split. Other than in `datasets`, capital letters count as small ones
    (``Test.txt`` is no training text), and a file that is of two splits at once is refused.

    Args:
        paths: The files, relative to the folder.

    Raises:
        ValueError: A name says two splits.

    Example:
        >>> {path.name: split for path, split in split_files([PurePath("a_train.txt"), PurePath("testing.txt")]).items()}
        {'a_train.txt': 'train', 'testing.txt': 'test'}
    """
    for rule in (_by_shard, _by_folder, _by_file):
        splits = {path: rule(path) for path in paths}
        for path, names in splits.items():
            if len(names) > 1:
                raise ValueError(
                    f"the name {listing([str(path)])} says two splits, {' and '.join(names)}; rename the file or its folder, "
                    "or give a folder further down as `root` (data.root=DIR)"
                )
        if any(splits.values()):
            return {path: names[0] for path, names in splits.items() if names}
    return dict.fromkeys(paths, "train")


def splits_in(*names: str) -> list[Split]:
    """The splits that the names of folders say.

    Example:
        >>> splits_in("corpus", "validation1")
        ['val']
    """
    return [split for split, pattern in _IN_FOLDER.items() if any(map(pattern.fullmatch, names))]


def _by_shard(path: PurePath) -> list[Split]:
    shard = _SHARD.fullmatch(path.name) if path.parts[:-1] == ("data",) else None
    return splits_in(shard[1]) if shard else []


def _by_folder(path: PurePath) -> list[Split]:
    return splits_in(*path.parts[:-1])


def _by_file(path: PurePath) -> list[Split]:
    return [split for split, pattern in _IN_FILE.items() if pattern.fullmatch(path.name)]
