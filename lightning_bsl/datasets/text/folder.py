"""Any folder of text."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_bsl.datasets.files import OPENED, files_below, listing, permitted, shown
from lightning_bsl.datasets.text.datamodule import Document, TextDataModule
from lightning_bsl.datasets.text.records import KINDS, is_records, kind_of, read_document, read_records
from lightning_bsl.datasets.text.splits import Split, split_files

# what describes a data set on the hub, as `datasets` has it, and what stands beside text and is no part of it
_NO_DATA = re.compile(
    r"(config|dataset_infos?|dataset_dict)\.json|dummy_data\.zip"
    r"|(readme|licen[sc]e|copying|notice|changelog|citation|requirements)(\.txt|\.md|\.rst|\.cff)?",
    re.IGNORECASE,
)
_CACHE = re.compile(r"\w+-[0-9a-f]{16}")  # the name of a cache's folder


class TextFolder(TextDataModule):
    """Any folder of text: ``.txt`` (a file is a document), ``.jsonl``, ``.json`` and ``.parquet`` (a record is a document).

    All but Parquet may be compressed (``.txt.gz``, ``.jsonl.xz``, ``.json.bz2``). The names of folders and files say their
    splits, by the rules of the library `datasets`: see ``split_files`` in ``datasets/text/splits.py``.
    Without a validation split, whole documents of the training split become one. Documents and records that are blank do not
    count. Hidden files, ``README``, ``LICENSE`` and the like do not count either. A warning names other files that are left
    out.

    Args:
        root: The folder; its subfolders count, and links are followed.
        text_column: Where a record has its text.
        **options: As of ``TextDataModule``.

    Raises:
        FileNotFoundError: When loading: no folder, or no text in it.
        ValueError: When loading: a file or a record that cannot be read, a name that says two splits, or a split without
            text; and as of ``TextDataModule``.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in "abc":
        ...     _ = (folder / f"{name}.txt").write_text(f"This is the document {name}. " * 20)
        >>> data = TextFolder(folder, block_size=8, tokenizer="train", vocab_size=300, cache_dir=folder / "cache")
        >>> data.prepare_data(), data.setup()
        (None, None)
        >>> data.train_set[0].shape
        torch.Size([8])
    """

    def __init__(self, root: str | Path | None = None, *, text_column: str = "text", **options: Any) -> None:
        super().__init__(root, **options)
        self.text_column = text_column

    @permitted()
    def locate(self) -> Path:
        """Return ``root``."""
        if not self.root.is_dir():
            there = "is no folder" if self.root.exists() else "is not there"
            raise FileNotFoundError(
                f"{shown(self.root)} {there}; write `root`, the folder with the text (on the command line data.root=DIR)"
            )
        splits, left_out = self._sort_files(self.root)
        if not splits:
            there = f"it holds {self._kinds_of(left_out)}" if left_out else "it is empty"
            raise FileNotFoundError(
                f"no file in {shown(self.root)} is of a kind that can be read ({', '.join(KINDS)}, also with .gz, .bz2 or .xz "
                f"but for Parquet): {there}; convert or unpack the files, or write another `root` (data.root=DIR)"
            )
        if "train" not in splits.values():
            there = f" ({listing(str(path.relative_to(self.root)) for path in left_out)})" if left_out else ""
            raise FileNotFoundError(
                f"{shown(self.root)} has no text to train on: the names of files or folders say "
                f"{' and '.join(sorted({*splits.values()}))}, and none says train{there}; put the training text into a folder "
                "`train`"
            )
        return self.root

    def fetch(self) -> None:
        """Say what is missing, and that there is nothing to download."""
        try:
            self.locate()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}. Nothing is known that could be downloaded to it: leave out `download`"
            ) from error

    def prepare_data(self) -> None:
        """Pack the text, and warn of files that are left out; on one process only."""
        super().prepare_data()
        _, left_out = self._sort_files(self.locate())
        if left_out:
            warnings.warn(
                f"files in {shown(self.root)} that are left out: {self._kinds_of(left_out)}, for example "
                f"{listing((str(path.relative_to(self.root)) for path in left_out), most=3)}: of another kind, or of no split "
                "while other files are of one",
                stacklevel=2,
            )

    def fingerprint(self) -> object:
        """Names, splits, sizes and times of the files."""
        folder = self.locate()
        splits, _ = self._sort_files(folder)
        stats = [(path.relative_to(folder).as_posix(), split, path.stat()) for path, split in splits.items()]
        return self.text_column, [(name, split, stat.st_size, stat.st_mtime_ns) for name, split, stat in stats]

    def documents(self) -> Iterator[Document]:
        """Yield the documents of every file."""
        splits, _ = self._sort_files(self.locate())
        empty = set(splits.values())
        for path, split in splits.items():
            for text in self._texts(path):
                if text.strip():
                    empty.discard(split)
                    yield split, text
        for split in sorted(empty):
            names = (str(path) for path, other in splits.items() if other == split)
            raise ValueError(f"the {split} split has no text: {listing(names)}; give it text, or remove its files")

    def text_of(self, record: Mapping[str, Any]) -> str:
        """Return the text of a record.

        Raises:
            ValueError: If it has none; the message says why, and what to do.
        """
        if self.text_column not in record:
            raise ValueError(
                f"there is no {self.text_column!r}, but {listing(map(str, record)) or 'nothing'}; write `text_column`, the "
                "name of the column with the text (data.text_column=NAME), or move the file out of the folder if it is no data"
            )
        return text_in(record[self.text_column], self.text_column)

    def _readable(self, path: Path) -> bool:
        """Whether the files of this path's kind count."""
        return kind_of(path) is not None

    def _sort_files(self, folder: Path) -> tuple[dict[Path, Split], list[Path]]:
        """The files with their splits, sorted; and those that are left out."""
        inside = folder.resolve() in self.cache_dir.resolve().parents
        below = files_below(folder, [self.cache_dir] if inside else [], lambda path: kind_of(path) is not None)
        paths = [path for path in below if not _is_cached(path)]
        readable = [path for path in paths if not _NO_DATA.fullmatch(path.name) and self._readable(path)]
        packed, there = [path for path in readable if path.suffix.lower() in OPENED], set(readable)
        if twice := next((path for path in packed if path.with_suffix("") in there), None):
            raise ValueError(
                f"{shown(twice)} lies beside {listing([twice.stem])}, not compressed: the same text would count "
                "twice; remove one of them, or give it another name"
            )
        splits = split_files([path.relative_to(folder) for path in readable])
        left_out = [
            path
            for path in paths
            if path.relative_to(folder) not in splits and (path.suffix == ".txt" or not _NO_DATA.fullmatch(path.name))
        ]
        return {folder / path: split for path, split in splits.items()}, left_out

    @staticmethod
    def _kinds_of(paths: list[Path]) -> str:
        counts = Counter(path.suffix or path.name for path in paths)
        return listing(f"{kind} ({number:,})" for kind, number in counts.most_common())

    def _texts(self, path: Path) -> Iterator[str]:
        if not is_records(path):
            yield read_document(path)
            return
        for place, record in read_records(path, self.text_column):
            if not isinstance(record, Mapping):
                raise ValueError(
                    f'{place} is {_kind_of_value(record)} and not an object; write records like {{"{self.text_column}": "..."}}'
                )
            try:
                yield self.text_of(record)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error


def text_in(value: object, name: str) -> str:
    """Return a text from a record.

    Args:
        value: What the record has.
        name: Where, for the message.

    Raises:
        ValueError: It is no text.
    """
    if value is None:
        raise ValueError(f"{name!r} is null; give it a text, or leave the record out")
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {_kind_of_value(value)} and not a text; write it in quotes, or name another column")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        wrong = f"\\u{ord(value[error.start]):04x}"
        raise ValueError(
            f"{name!r} has half a character ({wrong}, a lone surrogate); take it out, or write the whole character"
        ) from error
    return value


def _kind_of_value(value: object) -> str:
    kinds = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    text = repr(value)
    return f"{kinds.get(type(value), type(value).__name__)} ({text if len(text) <= 60 else text[:60] + '...'})"


def _is_cached(path: Path) -> bool:
    """Whether a file is part of a cache."""
    return bool(_CACHE.fullmatch(path.parent.name)) and (path.parent / "about.json").is_file()
