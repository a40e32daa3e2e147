"""ELI5-Category, the text of Li et al. 2024 (arXiv 2405.14578)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning_bsl.datasets.files import is_hidden, listing, permitted, shown
from lightning_bsl.datasets.hub import check_reachable, text_library
from lightning_bsl.datasets.text.folder import TextFolder, text_in
from lightning_bsl.datasets.text.records import is_records
from lightning_bsl.datasets.text.splits import splits_in


class ELI5Category(TextFolder):
    """ELI5-Category (Gao et al. 2021): 91,772 questions of Reddit's r/explainlikeimfive with their answers.

    It is the text that Li et al. 2024 (arXiv 2405.14578) train on. A document is the answers to one question, parted by a
    space, as in the guide to language modelling of `transformers`. The splits ``validation1`` and ``validation2`` of the hub
    are the validation split.

    Args:
        root: The folder ``eli5_category``, or its parent: Parquet or JSON files as the hub has them, in folders (or with
            names) that say ``train``, ``validation1``, ``validation2`` and ``test``.
        **options: As of ``TextDataModule``.

    Raises:
        FileNotFoundError: When loading: no data.
        ValueError: When loading: as of ``TextFolder``.

    Example:
        >>> ELI5Category(block_size=128).tokens_per_sample
        128
    """

    hub_name: ClassVar[str] = "rexarski/eli5_category"
    revision: ClassVar[str] = "refs/convert/parquet"  # the hub's own conversion; the main branch is a script, which nobody runs

    def __init__(self, root: str | Path | None = None, **options: Any) -> None:
        super().__init__(root, text_column="answers", **options)

    @permitted()
    def locate(self) -> Path:
        """Return the folder with the files."""
        for folder in (self.root / "eli5_category", self.root):
            if folder.is_dir() and (folder != self.root or self._names_splits()):
                splits = self._sort_files(folder)[0].values()
                if "train" in splits and "val" in splits:
                    return folder
        raise FileNotFoundError(
            f"ELI5-Category is not in {shown(self.root)}: there are no records for both train and validation. Write "
            f"`data.download=true` where {self.hub_name} can be reached on huggingface.co. Elsewhere, {self._by_hand()}"
        )

    def fetch(self) -> None:
        """Download from the hub with `datasets`, a Parquet file for each split."""
        folder = self.root / "eli5_category"
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            there = listing(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "it is a file"
            raise FileExistsError(
                f"{shown(folder)} holds something else than ELI5-Category ({there}); move it away, or write another "
                " `root` (data.root=DIR)"
            )
        check_reachable(self.hub_name, "dataset", f"To bring the data by hand, {self._by_hand()}", self.revision)
        datasets = text_library("datasets")
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=self.root) as temporary:
            cache = os.path.join(temporary, "cache")  # or a copy would stay in the cache of `datasets`
            try:
                for split, data in datasets.load_dataset(self.hub_name, revision=self.revision, cache_dir=cache).items():
                    data.to_parquet(os.path.join(temporary, "data", f"{split}.parquet"))
            except Exception as error:  # the network's, the hub's and Arrow's errors have no base in common
                raise ConnectionError(
                    f"{self.hub_name} could not be downloaded to {shown(folder)} ({error}); try again, or {self._by_hand()}"
                ) from error
            os.replace(os.path.join(temporary, "data"), folder)

    def text_of(self, record: Mapping[str, Any]) -> str:
        """Join the answers: lists of their parts, or a list of them.

        Raises:
            ValueError: If it has none; the message says why, and what to do.
        """
        try:
            answers = record["answers"]
            texts = answers["text"] if isinstance(answers, Mapping) else [answer["text"] for answer in answers]
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                raise TypeError("no list")
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"there is no list of texts in 'answers' as ELI5-Category has it (columns: {listing(map(str, record))}); move "
                f"the file out of the folder, or {self._by_hand()}"
            ) from error
        return " ".join(text_in(text, f"answers.text[{index}]") for index, text in enumerate(texts))

    def _readable(self, path: Path) -> bool:
        return super()._readable(path) and is_records(path)

    def _names_splits(self) -> bool:
        """Whether names in ``root`` itself say splits; else it may be the folder of many data sets, which are not searched."""
        splits = splits_in(*(path.name for path in self.root.iterdir() if not is_hidden(path.name)))
        return "train" in splits and "val" in splits

    def _by_hand(self) -> str:
        return (
            f"download the folders of https://huggingface.co/datasets/{self.hub_name}/tree/{self.revision.replace('/', '%2F')}"
            f"/default (train, validation1, validation2, test) and put them into {self.root / 'eli5_category'}"
        )
