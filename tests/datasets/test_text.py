"""Text: reading what people have, splitting it without leaks, and packing it without losing or doubling a token."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from torch.utils.data import DataLoader

import datasets
from lightning_bsl.datasets import ELI5Category, PydocTopics, TextDataModule, TextFolder, TokenBlocks
from lightning_bsl.datasets.text import END_OF_TEXT, TokenDocuments, pad, read_tokenizer, train_tokenizer
from lightning_bsl.datasets.text.tokens import open_blocks, open_documents

WORDS = ["grow", "the", "batch", "size", "während", "日本", "🙂", "  ", "\n", "rate", "and", "of", END_OF_TEXT]
OPTIONS: dict[str, Any] = {"block_size": 8, "tokenizer": "train", "vocab_size": 300}


def texts(number: int, seed: int = 0) -> list[str]:
    random.seed(seed)
    return [" ".join([f"Document {seed}.{index}:", *random.choices(WORDS, k=index + 3)]) for index in range(number)]


def folder_of(folder: Path, documents: Iterable[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, text in enumerate(documents):
        (folder / f"{index:03}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def load(datamodule: TextDataModule) -> TextDataModule:
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def rebuilt(datamodule: TextDataModule, split: str) -> list[str]:
    """The documents of a split, from its blocks and what is left over."""
    data = getattr(datamodule, f"{split}_set")
    tokens = [*data.__getitems__(range(len(data))).flatten().tolist(), *data.remainder.tolist()]
    assert len(data.remainder) < data.block_size
    tokenizer = datamodule.load_tokenizer()
    end = tokenizer.token_to_id(END_OF_TEXT)
    ends = [index for index, token in enumerate(tokens) if token == end]
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(tokens[a + 1 : b], skip_special_tokens=False) for a, b in zip([-1, *ends], ends)]


class TestTokenBlocks:
    def test_blocks(self) -> None:
        data = TokenBlocks(np.arange(11, dtype=np.uint16), block_size=3)
        assert data[2].tolist() == [6, 7, 8]
        assert data.__getitems__(torch.tensor([2, 0])).tolist() == [[6, 7, 8], [0, 1, 2]]
        assert data.__getitems__([1]).dtype == torch.int64
        assert (len(data), data.remainder.tolist()) == (3, [9, 10])

    def test_a_worker_is_sent_the_name_of_the_file(self, tmp_path: Path) -> None:
        tokens = np.arange(100_000, dtype=np.uint32)
        tokens.tofile(tmp_path / "tokens.bin")
        sent = pickle.dumps(open_blocks(tmp_path / "tokens.bin", "<u4", 10))
        assert len(sent) < 1000
        assert pickle.loads(sent)[9999].tolist() == list(range(99_990, 100_000))
        assert pickle.loads(pickle.dumps(TokenBlocks(tokens, 10)))[1].tolist() == list(range(10, 20))

    def test_a_worker_is_sent_a_part_of_a_file_as_it_is(self, tmp_path: Path) -> None:
        np.arange(100, dtype=np.uint32).tofile(tmp_path / "tokens.bin")
        part = TokenBlocks(np.memmap(tmp_path / "tokens.bin", np.uint32, mode="r")[60:], 10)
        sent = pickle.loads(pickle.dumps(part))
        assert (len(sent), sent[0].tolist()) == (4, list(range(60, 70)))

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="7 tokens do not fill one block of 8; write a smaller `block_size`"):
            TokenBlocks(np.arange(7), 8)
        with pytest.raises(ValueError, match="`block_size=1` must be 2 or more"):
            TokenBlocks(np.arange(7), 1)


class TestTokenDocuments:
    @pytest.mark.parametrize("block_size", [2, 5, 8, 100])
    def test_documents_are_cut_and_nothing_is_lost(self, block_size: int) -> None:
        sizes = [3, 1, 16, 5, 17, 1, 8, 9, 2]
        row, ends = np.arange(sum(sizes), dtype=np.uint16), np.cumsum(sizes)
        data = TokenDocuments(row, ends, block_size)
        expected = []
        for size, end in zip(sizes, ends.tolist()):
            document = list(range(end - size, end))
            expected += [document[start : start + block_size] for start in range(0, size, block_size)]
        expected = [part for part in expected if len(part) > 1]
        assert [part.tolist() for part in data] == expected
        assert data.lengths.tolist() == [len(part) for part in expected]
        assert len(data) == len(expected)
        chosen = torch.tensor([len(data) - 1, 0, 2])
        for indices in (chosen, chosen.tolist()):
            batch = data.__getitems__(indices)
            assert [(part.tolist(), part.dtype) for part in batch] == [(expected[i], torch.int64) for i in chosen.tolist()]

    def test_padding(self) -> None:
        batch = pad([torch.tensor([7, 8]), torch.tensor([9, 7, 8]), torch.tensor([6, 0])])
        assert batch["input_ids"].tolist() == [[7, 8, 0], [9, 7, 8], [6, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
        assert {values.dtype for values in batch.values()} == {torch.int64}
        assert {values.shape for values in pad([]).values()} == {(0, 0)}  # of a process without a share

    def test_a_worker_is_sent_the_name_of_the_files(self, tmp_path: Path) -> None:
        tokens, ends = np.arange(100_000, dtype=np.uint32), np.arange(10, 100_001, 10)
        tokens.tofile(tmp_path / "train.bin")
        ends.tofile(tmp_path / "train_ends.bin")
        sent = pickle.dumps(open_documents(tmp_path / "train.bin", "<u4", 6))
        assert len(sent) < 1000
        received = pickle.loads(sent)
        assert isinstance(received.tokens, np.memmap)
        assert received[19_999].tolist() == list(range(99_996, 100_000))
        assert pickle.loads(pickle.dumps(TokenDocuments(tokens, ends, 6)))[1].tolist() == list(range(6, 10))

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="none of the 3 documents has 2 tokens"):
            TokenDocuments(np.arange(3), np.arange(1, 4), 8)
        with pytest.raises(ValueError, match="`block_size=1` must be 2 or more"):
            TokenDocuments(np.arange(7), np.array([7]), 1)


class TestWholeDocuments:
    @pytest.fixture
    def data(self, tmp_path: Path) -> TextFolder:
        folder = folder_of(tmp_path / "text", texts(40))
        return TextFolder(folder, cache_dir=tmp_path / "cache", pack=False, **OPTIONS | {"block_size": 50})

    def test_they_are_the_documents(self, data: TextFolder) -> None:
        assert data.tokens_per_sample is None  # known before the text is read
        tokenizer = load(data).load_tokenizer()
        assert isinstance(data.train_set, TokenDocuments)
        assert isinstance(data.val_set, TokenDocuments)
        found = [part.tolist() for dataset in (data.train_set, data.val_set) for part in dataset]
        end = tokenizer.token_to_id(END_OF_TEXT)
        tokenizer.encode_special_tokens = True  # a text that says so does not end there
        documents = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts(40))]
        parts = [document[start : start + 50] for document in documents for start in range(0, len(document), 50)]
        assert len(parts) > len(documents)  # some are cut
        assert sorted(found) == sorted(part for part in parts if len(part) > 1)
        assert data.tokens_per_sample is None

    @pytest.mark.parametrize("workers", [0, 1])
    def test_loaders(self, workers: int, data: TextFolder) -> None:
        data.num_workers = workers
        load(data)
        for dataset, loader in ((data.train_set, data.train_dataloader()), (data.val_set, data.val_dataloader())):
            seen = []
            for batch in loader:
                tokens, mask = batch["input_ids"], batch["attention_mask"]
                assert tokens.shape == mask.shape
                assert mask.sum(dim=1).max() == mask.shape[1]  # the longest is not padded
                seen += [row[: int(length)].tolist() for row, length in zip(tokens, mask.sum(dim=1))]
                assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
            assert sorted(seen) == sorted(part.tolist() for part in dataset)  # type: ignore[union-attr]

    def test_the_cache_is_that_of_blocks(self, data: TextFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        load(data)
        monkeypatch.setattr(TextDataModule, "_pack", lambda *_: pytest.fail("packed again"))
        blocks = load(TextFolder(data.root, cache_dir=data.cache_dir, **OPTIONS | {"block_size": 50}))
        assert isinstance(blocks.train_set, TokenBlocks)
        assert isinstance(data.train_set, TokenDocuments)
        assert np.array_equal(blocks.train_set.tokens, data.train_set.tokens)
        assert isinstance(data.train_set.tokens, np.memmap)

    def test_a_split_shorter_than_a_block(self, tmp_path: Path) -> None:
        for split, text in (("train", "enough " * 500), ("val", "short")):
            folder_of(tmp_path / "text" / split, [text])
        data = load(TextFolder(tmp_path / "text", cache_dir=tmp_path / "cache", pack=False, **OPTIONS | {"block_size": 50}))
        assert [len(part) for part in data.val_set] == [len(data.load_tokenizer().encode("short").ids) + 1]  # type: ignore[attr-defined]

    def test_a_split_without_a_sample(self, tmp_path: Path) -> None:
        folder_of(tmp_path / "text" / "train", ["enough " * 500])
        (tmp_path / "text" / "val").mkdir()
        (tmp_path / "text" / "val" / "0.jsonl").write_text(json.dumps({"text": "\u200b"}))
        tokenizer = train_tokenizer(["enough " * 500], 300)
        tokenizer.normalizer = tokenizers.normalizers.Replace("\u200b", "")  # a text without a token
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        options = OPTIONS | {"tokenizer": tmp_path / "tokenizer.json", "cache_dir": tmp_path / "cache"}
        with pytest.raises(ValueError, match="the val split has 1 tokens, which do not make a sample; write another `val_frac"):
            load(TextFolder(tmp_path / "text", pack=False, **options))


class TestPacking:
    def test_no_token_is_lost_or_doubled(self, tmp_path: Path) -> None:
        documents = [*texts(40), "", "x", END_OF_TEXT * 3, " leading and trailing \r\n"]
        datamodule = load(TextFolder(folder_of(tmp_path / "text", documents), cache_dir=tmp_path / "cache", **OPTIONS))
        train, val = rebuilt(datamodule, "train"), rebuilt(datamodule, "val")
        assert sorted(train + val) == sorted(filter(None, documents))
        assert [text for text in documents if text in set(train)] == train  # in their order
        assert datamodule.tokens_per_sample == 8

    def test_every_block_is_trained_on_once_an_epoch(self, tmp_path: Path) -> None:
        datamodule = load(TextFolder(folder_of(tmp_path / "text", texts(40)), cache_dir=tmp_path / "cache", **OPTIONS))
        assert isinstance(datamodule.train_set, TokenBlocks)
        seen = torch.cat(list(datamodule.train_dataloader()))
        assert sorted(seen.tolist()) == sorted(datamodule.train_set.blocks.tolist())
        assert not torch.equal(seen, torch.from_numpy(datamodule.train_set.blocks.astype(np.int64)))
        loader = datamodule.val_dataloader()
        assert isinstance(loader, DataLoader)
        assert torch.cat(list(loader)).tolist() == datamodule.val_set.blocks.tolist()  # type: ignore[union-attr]

    def test_a_large_vocabulary(self, tmp_path: Path) -> None:
        """Tokens beyond 65,535 need four bytes."""
        words = [f"w{index}" for index in range(70_000)]
        vocabulary = {END_OF_TEXT: 0} | {word: index + 1 for index, word in enumerate(words)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(tmp_path / "words.json"))
        folder = folder_of(tmp_path / "text", [" ".join(words[start : start + 10_000]) for start in range(0, 70_000, 10_000)])
        options = {"block_size": 8, "tokenizer": tmp_path / "words.json", "vocab_size": 70_001}
        datamodule = load(TextFolder(folder, cache_dir=tmp_path / "cache", **options))
        found = np.concatenate([datamodule.train_set.tokens, datamodule.val_set.tokens])  # type: ignore[union-attr]
        assert sorted(found[found > 0].tolist()) == list(range(1, 70_001))


class TestSplit:
    def test_by_document_and_by_content(self, tmp_path: Path) -> None:
        documents = texts(60)
        copies = [*documents, *documents[:30]]
        options = OPTIONS | {"val_fraction": 0.3, "cache_dir": tmp_path / "cache"}
        datamodule = load(TextFolder(folder_of(tmp_path / "a", copies), **options))
        train, val = set(rebuilt(datamodule, "train")), set(rebuilt(datamodule, "val"))
        assert not train & val
        assert 0.27 <= sum(map(len, val)) / sum(map(len, documents)) <= 0.3
        backwards = load(TextFolder(folder_of(tmp_path / "b", reversed(documents)), **options))
        assert set(rebuilt(backwards, "val")) == val

    @pytest.mark.parametrize("names", [
        ("train/0.txt", "validation1/0.txt", "validation2/0.txt", "test/0.txt"),
        ("eli5-train.txt", "dev.txt", "Valid_2.txt", "my.test.txt"),
        ("train/constrained.txt", "val/0.txt", "val/1.txt", "testing/train.txt"),
        ("training.txt", "valid.txt", "2.dev.txt", "evaluation.txt"),
        tuple(f"data/{name}-00000-of-00001.txt" for name in ("train", "validation1", "val", "test")),
    ])  # fmt: skip
    def test_files_that_say_their_split(self, names: tuple[str, ...], tmp_path: Path) -> None:
        for name, text in zip(names, texts(4)):
            path = tmp_path / "text" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text * 3)
        datamodule = load(TextFolder(tmp_path / "text", cache_dir=tmp_path / "cache", **OPTIONS))
        found = [[text[: text.index(":")] for text in rebuilt(datamodule, split)] for split in ("train", "val", "test")]
        assert [found[0], sorted(found[1]), found[2]] == [["Document 0.0"], ["Document 0.1", "Document 0.2"], ["Document 0.3"]]

    def test_the_tokenizer_learns_from_training_documents_alone(self, tmp_path: Path) -> None:
        for split, text in (("train", "abab " * 50), ("val", "cdcd " * 50)):
            folder_of(tmp_path / "text" / split, [text])
        tokenizer = load(TextFolder(tmp_path / "text", cache_dir=tmp_path / "cache", **OPTIONS)).load_tokenizer()
        assert tokenizer.encode("abab cdcd").tokens == ["abab", "Ġ", "c", "d", "c", "d"]

    @pytest.mark.parametrize("documents", [["one"], ["twice", "twice"]])
    def test_nothing_to_hold_out(self, documents: list[str], tmp_path: Path) -> None:
        folder_of(tmp_path / "text" / "test", ["some"])
        folder_of(tmp_path / "text" / "train", documents)
        datamodule = TextFolder(tmp_path / "text", cache_dir=tmp_path / "cache", **OPTIONS)
        with pytest.raises(ValueError, match=r"1 different documents to train on.*put files into folders `train` and `val`"):
            datamodule.prepare_data()

    def test_a_split_without_a_block(self, tmp_path: Path) -> None:
        for split, text in (("train", "enough " * 500), ("val", "short")):
            folder_of(tmp_path / "text" / split, [text])
        datamodule = TextFolder(tmp_path / "text", cache_dir=tmp_path / "cache", **OPTIONS | {"block_size": 50})
        with pytest.raises(ValueError, match=r"the val split has [1-6] tokens, which do not fill one block of 50"):
            load(datamodule)


ELI5 = [
    {
        "q_id": f"q{index}",
        "title": f"Why {index}?",
        "selftext": "",
        "category": "Biology",
        "subreddit": "explainlikeimfive",
        "answers": {
            "a_id": ["a", "b"],
            "text": [f"Because of {index}.", "And of URL_0."],
            "score": [3, 1],
            "text_urls": [[], ["https://example.org"]],
        },
        "title_urls": [],
        "selftext_urls": [] if index else ["https://example.org"],
    }
    for index in range(20)
]
PARTS = {"train": (0, 14), "validation1": (14, 16), "validation2": (16, 18), "test": (18, 20)}
ANSWERS = [f"Because of {index}. And of URL_0." for index in range(20)]
EXPECTED = [ANSWERS[:14], ANSWERS[14:18], ANSWERS[18:]]


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.name.endswith("list.json"):
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, records)) + "\n")


@pytest.mark.parametrize("name", ["0000.parquet", "lines.jsonl", "lines.json", "list.json"])
class TestKinds:
    def test_records(self, name: str, tmp_path: Path) -> None:
        records = [{"id": index, "body": text} for index, text in enumerate(texts(20))]
        write_records(tmp_path / "text" / name, records)
        options = OPTIONS | {"cache_dir": tmp_path / "cache"}
        datamodule = load(TextFolder(tmp_path / "text", text_column="body", **options))
        assert sorted(rebuilt(datamodule, "train") + rebuilt(datamodule, "val")) == sorted(texts(20))
        with pytest.raises(ValueError, match=rf"{name}: there is no 'text', but id, body; write `text_column`"):
            load(TextFolder(tmp_path / "text", **options))

    @pytest.mark.parametrize("layout", ["lists of parts", "list of answers"])
    @pytest.mark.parametrize("inside", [True, False])
    def test_eli5_as_on_the_hub(self, name: str, layout: str, inside: bool, tmp_path: Path) -> None:
        records = ELI5
        if layout == "list of answers":
            parts = [[dict(zip(each["answers"], answer)) for answer in zip(*each["answers"].values())] for each in ELI5]  # type: ignore[attr-defined]
            records = [each | {"answers": answers} for each, answers in zip(ELI5, parts)]
        folder = tmp_path / "eli5_category"
        for split, some in (
            ("train", slice(14)),
            ("validation1", slice(14, 16)),
            ("validation2", slice(16, 18)),
            ("test", slice(18, 20)),
        ):
            write_records(folder / split / name, records[some])
        datamodule = load(ELI5Category(folder if inside else tmp_path, cache_dir=tmp_path / "cache", **OPTIONS))
        found = [rebuilt(datamodule, split) for split in ("train", "val", "test")]
        assert found == EXPECTED


def refuse(*_: Any, **__: Any) -> None:
    raise ConnectionError("no network in tests")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


class TestELI5Download:
    def test_says_what_to_put_where(self, offline: None, tmp_path: Path) -> None:
        where = rf"huggingface.co/datasets/rexarski/eli5_category/tree/refs%2Fconvert%2Fparquet.*{tmp_path}/eli5_category"
        with pytest.raises(FileNotFoundError, match=f"`data.download=true`.*{where}"):
            ELI5Category(tmp_path, **OPTIONS).prepare_data()
        with pytest.raises(ConnectionError, match=f"cannot be reached.*no network in tests.*{where}"):
            ELI5Category(tmp_path, download=True, **OPTIONS).prepare_data()

    def test_gives_up_at_once_without_a_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("socket.getaddrinfo", refuse)
        monkeypatch.setattr("socket.create_connection", refuse)
        monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))  # between tries
        with pytest.raises(ConnectionError, match="cannot be reached"):
            ELI5Category(tmp_path, download=True, **OPTIONS).prepare_data()

    def test_downloads_to_where_it_is_looked_for(self, offline: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def hub(name: str, revision: str, cache_dir: str) -> datasets.DatasetDict:
            assert Path(cache_dir).is_relative_to(tmp_path / "data")  # and is gone with the rest that is unfinished
            assert (name, revision) == ("rexarski/eli5_category", "refs/convert/parquet")
            return datasets.DatasetDict({split: datasets.Dataset.from_list(ELI5[a:b]) for split, (a, b) in PARTS.items()})

        asked: list[str] = []
        monkeypatch.setattr(datasets, "load_dataset", hub)
        monkeypatch.setattr(
            huggingface_hub.HfApi, "repo_info", lambda _, name, **options: asked.append({"name": name} | options)
        )
        datamodule = ELI5Category(tmp_path / "data", download=True, cache_dir=tmp_path / "cache", **OPTIONS)
        load(datamodule)
        assert [rebuilt(datamodule, split) for split in ("train", "val", "test")] == [
            ANSWERS[:14],
            ANSWERS[14:18],
            ANSWERS[18:],
        ]
        assert asked[0]["name"] == "rexarski/eli5_category"
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["eli5_category"]
        monkeypatch.setattr(datasets, "load_dataset", refuse)
        load(ELI5Category(tmp_path / "data", download=True, cache_dir=tmp_path / "cache", **OPTIONS))  # not again


class TestCache:
    @staticmethod
    def make(tmp_path: Path, **options: Any) -> TextFolder:
        return TextFolder(tmp_path / "text", **OPTIONS | {"cache_dir": tmp_path / "cache"} | options)

    @pytest.fixture(autouse=True)
    def text(self, tmp_path: Path) -> None:
        folder_of(tmp_path / "text", texts(20))

    def test_is_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = load(self.make(tmp_path))
        monkeypatch.setattr(TextDataModule, "_pack", lambda *_: pytest.fail("packed again"))
        again, other = load(self.make(tmp_path)), load(self.make(tmp_path, block_size=5))
        assert np.array_equal(again.train_set.tokens, first.train_set.tokens)  # type: ignore[union-attr]
        assert len(other.train_set) == len(first.train_set.tokens) // 5  # type: ignore[union-attr,arg-type]
        assert isinstance(again.train_set.tokens, np.memmap)  # type: ignore[union-attr]

    def test_is_renewed(self, tmp_path: Path) -> None:
        load(self.make(tmp_path))
        (tmp_path / "text" / "new.txt").write_text("This is new.")
        both = load(self.make(tmp_path))
        assert "This is new." in rebuilt(both, "train") + rebuilt(both, "val")
        (tmp_path / "text" / "new.txt").write_text("This is odd.")  # as long
        os.utime(tmp_path / "text" / "new.txt", ns=(0, 0))
        both = load(self.make(tmp_path))
        assert "This is odd." in rebuilt(both, "train") + rebuilt(both, "val")
        for options in ({"vocab_size": 290}, {"val_fraction": 0.4}, {"tokenizer": tmp_path / "given.json"}):
            train_tokenizer(["another"], 280).save(str(tmp_path / "given.json"))
            before = len(list((tmp_path / "cache").iterdir()))
            load(self.make(tmp_path, **options))
            assert len(list((tmp_path / "cache").iterdir())) == before + 1

    @pytest.mark.parametrize("name", ["about.json", "tokenizer.json", "train.bin", "val.bin", "train_ends.bin", "test.bin"])
    @pytest.mark.parametrize("size", [0, 40, None])
    def test_one_cut_short_is_written_anew(self, name: str, size: int | None, tmp_path: Path) -> None:
        before = rebuilt(load(self.make(tmp_path)), "train")
        file = next((tmp_path / "cache").glob(f"*/{name}"))
        contents = file.read_bytes()
        file.unlink() if size is None else file.write_bytes(contents[:size])
        assert rebuilt(load(self.make(tmp_path)), "train") == before
        assert file.read_bytes() == contents
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_a_folder_of_text_with_an_about_file_is_no_cache(self, tmp_path: Path) -> None:
        (tmp_path / "text" / "about.json").write_text('{"text": "about these texts"}')
        datamodule = load(self.make(tmp_path))
        assert len(rebuilt(datamodule, "train") + rebuilt(datamodule, "val")) == 21

    def test_a_build_that_is_interrupted_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("lightning_bsl.datasets.text.datamodule.json.dumps", interrupt)  # all is written but the last file
            with pytest.raises(KeyboardInterrupt):
                self.make(tmp_path).prepare_data()
        assert list((tmp_path / "cache").iterdir()) == []
        load(self.make(tmp_path))

    def test_a_build_that_is_killed_leaves_no_half_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Killed(BaseException): ...

        def kill(source: Path, target: Path) -> None:
            assert not target.exists()
            assert sorted(path.name for path in source.iterdir()) == [
                "about.json", "test.bin", "test_ends.bin", "tokenizer.json",
                "train.bin", "train_ends.bin", "val.bin", "val_ends.bin",
            ]  # fmt: skip
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr("tempfile.TemporaryDirectory.__exit__", lambda *_: None)  # nobody cleans up
            patch.setattr("lightning_bsl.datasets.text.datamodule.os.replace", kill)
            with pytest.raises(Killed):
                self.make(tmp_path).prepare_data()
        datamodule = load(self.make(tmp_path))
        assert sorted(rebuilt(datamodule, "train") + rebuilt(datamodule, "val")) == sorted(texts(20))

    def test_two_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pack, other = TextDataModule._pack, self.make(tmp_path)

        def overtaken(self: TextDataModule, folder: Path, tokenizer: Any) -> None:
            pack(self, folder, tokenizer)
            if self is not other:
                other.prepare_data()

        monkeypatch.setattr(TextDataModule, "_pack", overtaken)
        datamodule = load(self.make(tmp_path))
        assert sorted(rebuilt(datamodule, "train") + rebuilt(datamodule, "val")) == sorted(texts(20))
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_a_cache_inside_the_folder_is_no_text(self, tmp_path: Path) -> None:
        inside = {"cache_dir": tmp_path / "text" / "cache"}
        first, again = load(self.make(tmp_path, **inside)), load(self.make(tmp_path, **inside))
        assert rebuilt(again, "train") == rebuilt(first, "train")
        assert len(list((tmp_path / "text" / "cache").iterdir())) == 1

    def test_text_inside_the_folder_of_the_caches(self, tmp_path: Path) -> None:
        (tmp_path / "text" / ".hidden").mkdir()
        (tmp_path / "text" / ".hidden" / "no.json").write_text("[{}]")
        datamodule = load(self.make(tmp_path, cache_dir=tmp_path))
        assert sorted(rebuilt(datamodule, "train") + rebuilt(datamodule, "val")) == sorted(texts(20))

    def test_setup_alone(self, tmp_path: Path) -> None:
        datamodule = self.make(tmp_path)
        datamodule.setup()
        assert datamodule.num_train_examples > 0

    def test_default_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert TextFolder().cache_dir == tmp_path / "lightning_bsl"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert TextFolder().cache_dir == Path.home() / ".cache" / "lightning_bsl"


class TestTokenizer:
    def test_files_of_every_kind(self, tmp_path: Path) -> None:
        trained = train_tokenizer(texts(20), 300)
        (tmp_path / "old").mkdir()
        trained.save(str(tmp_path / "tokenizer.json"))
        trained.model.save(str(tmp_path / "old"))  # vocab.json and merges.txt, as GPT-2 was published
        text = f"grow während {END_OF_TEXT} 🙂"
        for path in (tmp_path / "tokenizer.json", tmp_path, tmp_path / "old"):
            read = read_tokenizer(path)
            assert read.encode(text).ids == trained.encode(text).ids
            assert read.decode(read.encode(text).ids) == text
            assert read.token_to_id(END_OF_TEXT) == 0
        assert 0 not in trained.encode(text).ids

    @pytest.mark.parametrize("tokenizer, message", [
        ("empty", "empty has neither tokenizer.json nor vocab.json and merges.txt"),
        ("not/there/at/all", "is no file, no folder, and no model"),
        ("somebody/model", "somebody/model cannot be reached.*`tokenizer=DIR`.*`tokenizer=train`"),
    ])  # fmt: skip
    def test_no_such_tokenizer(self, tokenizer: str, message: str, offline: None, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        name = tmp_path / tokenizer if tokenizer == "empty" else tokenizer
        datamodule = TextFolder(folder_of(tmp_path / "text", texts(9)), cache_dir=tmp_path / "cache", tokenizer=name)
        with pytest.raises(FileNotFoundError, match=message):
            datamodule.prepare_data()

    def test_auto_trains_one_where_gpt2s_cannot_be_had(self, offline: None, tmp_path: Path) -> None:
        options = OPTIONS | {"tokenizer": "auto", "cache_dir": tmp_path / "cache"}
        datamodule = TextFolder(folder_of(tmp_path / "text", texts(20)), **options)
        with pytest.warns(UserWarning, match="trained on the data instead of GPT-2's: openai-community/gpt2 cannot be reached"):
            datamodule.prepare_data()
        datamodule.setup()
        assert datamodule.trained_tokenizer

    def test_auto_takes_gpt2s_from_the_cache_of_the_hub(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def cached(name: str, file: str, local_files_only: bool) -> str:
            assert (name, file, local_files_only) == ("openai-community/gpt2", "tokenizer.json", True)
            return str(tmp_path / "gpt2.json")

        train_tokenizer(texts(20), 290).save(str(tmp_path / "gpt2.json"))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
        options = OPTIONS | {"tokenizer": "auto", "cache_dir": tmp_path / "cache"}
        datamodule = load(TextFolder(folder_of(tmp_path / "text", texts(20)), **options))
        assert not datamodule.trained_tokenizer
        assert datamodule.load_tokenizer().get_vocab_size() == 290

    def test_more_tokens_than_the_model_is_told_of(self, tmp_path: Path) -> None:
        train_tokenizer(texts(20), 300).save(str(tmp_path / "tokenizer.json"))
        options = OPTIONS | {"tokenizer": tmp_path, "vocab_size": 299, "cache_dir": tmp_path / "cache"}
        with pytest.raises(ValueError, match="has 300 tokens, so write `vocab_size=300`"):
            load(TextFolder(folder_of(tmp_path / "text", texts(9)), **options))

    def test_no_end_of_text(self, tmp_path: Path) -> None:
        tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
        options = OPTIONS | {"tokenizer": tmp_path, "cache_dir": tmp_path / "cache"}
        with pytest.raises(ValueError, match=r"has no token <\|endoftext\|>"):
            load(TextFolder(folder_of(tmp_path / "text", texts(9)), **options))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not there; write `root`.*data.root=DIR"):
        TextFolder(tmp_path / "nowhere").prepare_data()
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match=r"file.txt is no folder; write `root`.*data.root=DIR"):
        TextFolder(tmp_path / "file.txt").prepare_data()
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no file in .* can be read .*it is empty; .* Nothing is known that could be downl"
    ):
        TextFolder(tmp_path / "empty", download=True).prepare_data()


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "text" / "train", texts(20)).parent
    for name in ("train/scores.csv", "more.csv", "val.jsonl", "LICENSE.txt", "README.md", "LICENSE", ".hidden.txt"):
        (folder / name).write_text("{}")
    with pytest.warns(
        UserWarning, match=r"left out: .csv \(2\), .txt \(1\), .jsonl \(1\), for example LICENSE.txt, more.csv"
    ) as told:
        TextFolder(folder, cache_dir=tmp_path / "cache", **OPTIONS).prepare_data()
    assert "README" not in str(told[0].message)


@contextmanager
def without_rights() -> Iterator[None]:
    """Whatever the rights of a file say, root may read it."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["train.txt", "train.jsonl", "train.parquet", "folder"])
def test_what_may_not_be_read(name: str) -> None:
    with tempfile.TemporaryDirectory(dir=Path(tempfile.gettempdir()).resolve()) as temporary:
        Path(temporary).chmod(0o755)
        path = Path(temporary, name)
        path.mkdir() if name == "folder" else path.write_text("text")
        path.chmod(0)
        with without_rights(), pytest.raises(PermissionError, match=rf"{name} cannot be read .*`chmod -R u\+rX`"):
            list(TextFolder(temporary, cache_dir=Path(temporary, "cache")).documents())


def test_a_folder_of_the_caches_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    datamodule = TextFolder(folder_of(tmp_path / "text", texts(9)), cache_dir=tmp_path / "cache", **OPTIONS)
    with pytest.raises(OSError, match=r"cannot be written to .*cache .*; write `cache_dir`.*data.cache_dir=DIR"):
        datamodule.prepare_data()


def test_python_without_its_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match=r"no `pydoc_data`.*install .*data=text data.root=DIR"):
        PydocTopics(cache_dir=tmp_path).prepare_data()


def test_a_download_replaces_nothing(offline: None, tmp_path: Path) -> None:
    (tmp_path / "eli5_category").mkdir()
    (tmp_path / "eli5_category" / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"eli5_category holds something else .*\(notes.txt\); move it away, or write another"
    ):
        ELI5Category(tmp_path, download=True, **OPTIONS).prepare_data()


def test_a_download_that_breaks_off_leaves_nothing(offline: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)  # it answers, and then no more
    with pytest.raises(
        ConnectionError, match=r"could not be downloaded to .* \(no network in tests\); try again, or download the"
    ):
        ELI5Category(tmp_path / "data", download=True, **OPTIONS).prepare_data()
    assert list((tmp_path / "data").iterdir()) == []


def test_a_folder_of_many_data_sets_is_not_searched_for_eli5(tmp_path: Path) -> None:
    folder_of(tmp_path / "a_train_test" / "train", texts(5))
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="ELI5-Category is not in"):
        ELI5Category(tmp_path).locate()


@pytest.mark.parametrize("contents, remedy", [
    (b'{"version": "1.0", "trunc', "remove it and download it"),
    (b"", "it is empty: remove it"),
    (b"<!DOCTYPE html>", "it is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_broken_tokenizer(name: str, contents: bytes, remedy: str, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / name).write_bytes(contents)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    datamodule = TextFolder(folder_of(tmp_path / "text", texts(9)), tokenizer=folder, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"{name} .*no tokenizer.*; .*{re.escape(remedy)}"):
        datamodule.prepare_data()


@pytest.mark.parametrize("options, message", [
    ({"block_size": 1}, "`block_size=1` must be 2 or more"),
    ({"val_fraction": 0.0}, "`val_fraction=0.0` must lie between 0 and 1"),
    ({"val_fraction": 1}, "`val_fraction=1` must lie between 0 and 1"),
    ({"vocab_size": 256}, "`vocab_size=256` must be 257 or more"),
])  # fmt: skip
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextFolder(**options)


def test_plans_before_the_text_is_there() -> None:
    datamodule = ELI5Category(samples_per_epoch=1000)
    assert datamodule.num_epoch_examples == 1000
    with pytest.raises(ValueError, match="no training set"):
        _ = ELI5Category().num_epoch_examples


def test_no_paragraph_of_pydoc_is_in_both_splits(tmp_path: Path) -> None:
    datamodule = load(PydocTopics(block_size=64, cache_dir=tmp_path))
    train, val = (
        {part.strip() for text in rebuilt(datamodule, split) for part in text.split("\n\n")} - {""}
        for split in ("train", "val")
    )
    assert not train & val
    assert len(train) > 1000
    share = len(datamodule.val_set) / (len(datamodule.train_set) + len(datamodule.val_set))  # type: ignore[arg-type]
    assert 0.05 < share < 0.3


@pytest.mark.parametrize("seed", range(6))
def test_validation_takes_no_more_than_its_share(seed: int, tmp_path: Path) -> None:
    long, short = " ".join(texts(200, seed)), " ".join(texts(4, seed + 100))
    data = load(TextFolder(folder_of(tmp_path / "data", [long, short]), cache_dir=tmp_path / "cache", **OPTIONS))
    assert rebuilt(data, "val") == [short]


def test_the_cache_may_lie_among_the_data(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, texts(50))
    for _ in range(2):
        data = load(TextFolder(folder, cache_dir=folder, **OPTIONS))
        assert sorted(rebuilt(data, "train") + rebuilt(data, "val")) == sorted(texts(50))


def test_a_tokenizer_too_large_is_refused_from_the_cache_too(tmp_path: Path) -> None:
    train_tokenizer(texts(50), 400).save(str(tmp_path / "tokenizer.json"))
    folder = folder_of(tmp_path / "data", texts(50))
    options = OPTIONS | {"tokenizer": tmp_path / "tokenizer.json", "cache_dir": tmp_path / "cache"}
    load(TextFolder(folder, **options | {"vocab_size": 400}))
    with pytest.raises(ValueError, match="tokens, so write `vocab_size="):
        load(TextFolder(folder, **options | {"vocab_size": 300}))


def test_eli5_leaves_other_data_sets_alone(tmp_path: Path) -> None:
    folder_of(tmp_path / "tiny-imagenet-200" / "train", texts(5))
    folder_of(tmp_path / "train", texts(5))
    with pytest.raises(FileNotFoundError, match="ELI5-Category is not in"):
        ELI5Category(tmp_path).locate()


def test_json_with_a_mark_of_its_encoding_and_without_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(50)), encoding="utf-8-sig")
    data = load(TextFolder(tmp_path, cache_dir=tmp_path / "cache", **OPTIONS))
    assert len(rebuilt(data, "train")) > 40
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match=r"train\.jsonl is not UTF-8: byte 0xff in line 1"):
        load(TextFolder(tmp_path, cache_dir=tmp_path / "cache", **OPTIONS))
