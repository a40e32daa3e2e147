"""Folders as people have them: each reader's table of what it reads all the same, and of what it refuses and how.

Every refusal names the file, and the record where there is one, and says what to do. It comes before the first step, by the way
that `bsl-train` goes, and leaves nothing half-written.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.broken import (
    AGAIN,
    ANSWERS,
    DATA_SETS,
    HTML,
    IDX,
    LFS,
    PAGE,
    RECORDS,
    TEST_IMAGES,
    TEST_LABELS,
    TEXTS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    WNIDS,
    Change,
    answers,
    batch,
    both,
    cifar10,
    cut,
    idx,
    jpeg,
    lines,
    loaded,
    names_in,
    parquet,
    pixels,
    put,
    read,
    remove,
)
from harness.configs import compose_config
from lightning_bsl.app.train import train

# --- what is refused: a change of a good folder, and the message

GZ = f"{TRAIN_IMAGES}.gz"
PACKED = gzip.compress(idx(pixels(12, 28, 28)))
FASHION_MNIST: dict[str, tuple[Change, str]] = {
    "images missing": (remove(TRAIN_IMAGES), rf"FashionMNIST: {TRAIN_IMAGES} \(or .gz\) not found in .*holds t10k.*root=DIR"),
    "two of four": (
        remove(TEST_IMAGES, TEST_LABELS),
        rf"{TEST_IMAGES}, {TEST_LABELS} \(or .gz\) not found .*data.download=true",
    ),
    "another data set": (
        both(remove(*IDX), cifar10),
        r"not found in .*: the folder holds cifar-10-batches-py; give the folder",
    ),
    "a folder by the name of a file": (
        both(remove(TEST_LABELS), put(f"{TEST_LABELS}/x")),
        rf"{TEST_LABELS} \(or .gz\) not found",
    ),
    "images cut short": (cut(TRAIN_IMAGES, -1), rf"{TRAIN_IMAGES} has 9,407 bytes .* 9,408: 11 whole records of 12; {AGAIN}"),
    "labels cut short": (cut(TRAIN_LABELS, -1), rf"{TRAIN_LABELS} has 11 bytes .* says 12: 11 whole records of 12; {AGAIN}"),
    "cut within the header": (cut(TRAIN_IMAGES, 10), rf"{TRAIN_IMAGES} is cut short within its header; {AGAIN}"),
    "images too long": (
        lambda folder: (folder / TRAIN_IMAGES).open("ab").write(b"more"),
        rf"{TRAIN_IMAGES} has 9,412 bytes .* says 9,408.*; {AGAIN}",
    ),
    "empty": (put(TRAIN_IMAGES), rf"{TRAIN_IMAGES} is no idx file of images.*; it is empty: {AGAIN}"),
    "a web page": (put(TRAIN_LABELS, HTML), rf"{TRAIN_LABELS} is no idx file of labels.*; {PAGE}"),
    "a pointer of Git LFS": (
        put(TEST_IMAGES, LFS),
        rf"{TEST_IMAGES} is no idx file.*; it is a pointer of Git LFS.*git lfs pull",
    ),
    "gzip without its ending": (put(TRAIN_IMAGES, PACKED), rf"{TRAIN_IMAGES} is no idx.* with gzip: .*name that ends in .gz"),
    "gzip cut short": (
        both(remove(TRAIN_IMAGES), put(GZ, PACKED[:-100])),
        rf"{TRAIN_IMAGES}.gz cannot be read \(Compressed file ended .*\); {AGAIN}",
    ),
    "gzip damaged": (
        both(remove(TRAIN_IMAGES), put(GZ, PACKED[:3000] + bytes(50) + PACKED[3050:])),
        rf"{TRAIN_IMAGES}.gz cannot be read \(.*\); {AGAIN}",
    ),
    "a web page as gzip": (
        both(remove(TRAIN_IMAGES), put(GZ, HTML)),
        rf"{TRAIN_IMAGES}.gz cannot be read \(Not a gzip.*; {PAGE}",
    ),
    "labels as images": (
        both(remove(TRAIN_IMAGES), lambda folder: (folder / TRAIN_IMAGES).write_bytes((folder / TRAIN_LABELS).read_bytes())),
        rf"{TRAIN_IMAGES} is no idx file of images, but holds labels; bring the file of images",
    ),
    "images as labels": (
        lambda folder: (folder / TRAIN_LABELS).write_bytes((folder / TRAIN_IMAGES).read_bytes()),
        rf"{TRAIN_LABELS} is no idx file of labels, but holds images; bring the file of labels",
    ),
    "pixels as integers": (
        put(TRAIN_IMAGES, idx(pixels(12, 28, 28), 12)),
        rf"{TRAIN_IMAGES} .* holds other data; bring the file of images",
    ),
    "images of another size": (
        put(TRAIN_IMAGES, idx(pixels(12, 32, 32))),
        r"has images of 32x32, not 28x28; bring the file of F",
    ),
    "fewer labels": (
        put(TRAIN_LABELS, idx(np.zeros(9, np.uint8))),
        rf"has 12 images and {TRAIN_LABELS} has 9 labels; bring both",
    ),
    "a label too large": (
        put(TRAIN_LABELS, idx(np.arange(12, dtype=np.uint8))),
        rf"{TRAIN_LABELS}: label 10 \(counted from 0\) is 10, but the classes are 0 to 9; bring the labels",
    ),
    "no images": (
        both(put(TRAIN_IMAGES, idx(pixels(0, 28, 28))), put(TRAIN_LABELS, idx(np.zeros(0, np.uint8)))),
        rf"{TRAIN_IMAGES} has 0 images and {TRAIN_LABELS} has 0 labels; bring both",
    ),
}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def cifar(folder: str, first: str, test: str, key: str, name: str, wrong: int) -> dict[str, tuple[Change, str]]:
    """The rows of both data sets."""
    path, bring = f"{folder}/{first}", f"bring the file of {name}"
    other = "fine_labels" if key == "labels" else "labels"
    return {
        "a file missing": (remove(path), rf"{name}: {path} not found in .*{folder}: the folder holds .*data.root=DIR"),
        "a test file missing": (remove(f"{folder}/{test}"), rf"{folder}/{test} not found in .*data.download=true"),
        "an archive not unpacked": (
            lambda root: [(root / folder).rename(root / "x"), put("cifar-python.tar.gz")(root)],
            rf"{path}.* not found in .*the folder holds cifar-python.tar.gz, x; give",
        ),
        "a file by the name of the folder": (
            lambda root: [(root / folder).rename(root / "x"), put(folder)(root)],
            rf"{path}.* not found in .*; give the folder",
        ),
        "cut short": (cut(path, -100), rf"{path} cannot be read \(.*\); {AGAIN}"),
        "cut to a few bytes": (cut(path, 20), rf"{path} cannot be read \(.*\); {AGAIN}"),
        "empty": (put(path), rf"{path} cannot be read \(.*\); it is empty: {AGAIN}"),
        "a web page": (put(path, HTML), rf"{path} cannot be read \(.*\); {PAGE}"),
        "a pointer of Git LFS": (put(path, LFS), rf"{path} cannot be read \(.*\); it is a pointer of Git LFS.*git lfs pull"),
        "gzip": (
            put(path, gzip.compress(batch(key=key))),
            rf"{path} cannot be read \(.*\); it is compressed with gzip: unpack it",
        ),
        "a pickle with code": (
            put(path, pickle.dumps(Evil())),
            rf"{path} cannot be read \(it wants to call .*system.*\); {AGAIN}",
        ),
        "a pickle of code by another name": (
            put(path, b"c__builtin__\neval\n(S'1'\ntR."),
            rf"{path} cannot be read \(it wants to call .*eval.*do not trust this file\); {AGAIN}",
        ),
        "a list": (put(path, pickle.dumps([1, 2])), rf"{path} has no 'data' and no '{key}', but is of type list; {bring}"),
        "the other data set": (put(path, batch(key=other)), rf"{path} has no '{key}', but data, {other}; {bring}"),
        "images as a list": (
            put(path, batch(key=key, data=[[0]])),
            rf"{path} has images of another form: list, not .*; {bring}",
        ),
        "images of another size": (
            put(path, batch(key=key, data=pixels(4, 784))),
            rf"{path} .*uint8 \[4, 784\], not .*; {bring}",
        ),
        "images as floats": (
            put(path, batch(key=key, data=np.zeros((4, 3072)))),
            rf"{path} .*float64 \[4, 3072\], not .*; {bring}",
        ),
        "fewer labels": (put(path, batch(4, key, **{key: [0, 1, 2]})), rf"{path} has 4 images and 3 labels"),
        "labels that are text": (
            put(path, batch(4, key, **{key: list("abcd")})),
            rf"{path} has 4 images and 0 labels that .*; {bring}",
        ),
        "labels of several lengths": (
            put(path, batch(4, key, **{key: [[0], [1, 2], 3, 4]})),
            rf"{path} has 4 images and 0 labels",
        ),
        "a label too large": (
            put(path, batch(4, key, **{key: [0, 1, wrong, 3]})),
            rf"{path}: label 2 \(counted from 0\) is {wrong}, but the classes are 0 to {wrong - 1}; bring the labels",
        ),
        "a label below 0": (
            put(path, batch(4, key, **{key: [0, -1, 2, 3]})),
            rf"{path}: label 1 .* is -1, but the classes are",
        ),
        "no images": (put(path, batch(0, key)), rf"{path} has 0 images and 0 labels.*; {bring}"),
    }


CIFAR_10 = cifar("cifar-10-batches-py", "data_batch_2", "test_batch", "labels", "CIFAR10", 10)
CIFAR_100 = cifar("cifar-100-python", "train", "test", "fine_labels", "CIFAR100", 100)

ANNOTATIONS = "val/val_annotations.txt"
LINES = [f"val_{row}.JPEG\t{wnid}\t0" for row, wnid in enumerate(WNIDS)]
FIRST = "train/n01/images/n01_0.JPEG"


def annotated(*changed: str) -> Change:
    return put(ANNOTATIONS, "\n".join(changed))


TINY_IMAGENET: dict[str, tuple[Change, str]] = {
    "no train": (
        lambda folder: (folder / "train").rename(folder / "Train"),
        r"train and val of .* not found.*holds Train, val, wn.*DIR",
    ),
    "no val": (
        lambda folder: (folder / "val").rename(folder / "test"),
        r"train and val of .* not found.*holds test, train.*data.root",
    ),
    "an archive not unpacked": (
        lambda folder: [(folder / "train").rename(folder.parent / "x"), put("tiny-imagenet-200.zip")(folder)],
        r"not found in .*: the folder holds tiny-imagenet-200.zip, val, wnids.txt; give the folder",
    ),
    "no wnids": (
        remove("wnids.txt"),
        r"train has 3 folders \(n01, n02, n03\), not one for each of the 200 .*; unpack.*wnids.txt, one",
    ),
    "wnids empty": (put("wnids.txt", "\n"), r"wnids.txt names 0 classes, not 1 to 200; unpack"),
    "wnids of too many": (
        put("wnids.txt", "\n".join(map(str, range(201)))),
        r"wnids.txt names 201 classes, not 1 to 200; unpack",
    ),
    "wnids no text": (put("wnids.txt", b"n\xff1\n"), rf"wnids.txt cannot be read \(.*utf-8.*\); {AGAIN}"),
    "wnids a web page": (put("wnids.txt", HTML), r"train has folders that are no class of wnids.txt: n01, n02, n03; move"),
    "a folder that is no class": (
        put("train/copies/x.txt"),
        r"train has folders that are no class of wnids.txt: copies; move them",
    ),
    "a class missing": (
        lambda folder: (folder / "train/n02").rename(folder / "n02"),
        r"train has no folder for n02.*; unpack .*leave",
    ),
    "a class without images": (
        remove("train/n02/images/n02_0.JPEG", "train/n02/images/n02_1.JPEG"),
        r"train/n02 has no images \(.jpeg, .jpg, .png\); unpack the data set again, or take the class out",
    ),
    "a broken image": (put(FIRST, b"\xff\xd8\xff\xe0 and so on"), rf"{FIRST} cannot be read \(.*\); {AGAIN}"),
    "an image cut short": (cut(FIRST, -200), rf"{FIRST} cannot be read \(.*\); {AGAIN}"),
    "an empty image": (put(FIRST), rf"{FIRST} cannot be read \(.*\); it is empty: {AGAIN}"),
    "a web page": (put(FIRST, HTML), rf"{FIRST} cannot be read \(.*\); {PAGE}"),
    "a pointer of Git LFS": (put(FIRST, LFS), rf"{FIRST} cannot be read \(.*\); it is a pointer of Git LFS.*git lfs pull"),
    "an image of another size": (jpeg(FIRST, 32), rf"{FIRST} is 32x32, not 64x64: not of this data set; move it out"),
    "a link to nothing": (
        lambda folder: (folder / "train/n01/images/n01_7.JPEG").symlink_to("../annex/object"),
        r"n01_7.JPEG is a link that leads nowhere .*: bring what it points to, or remove the link",
    ),
    "no annotations": (remove(ANNOTATIONS), rf"{ANNOTATIONS}, with the labels .*, is not there; unpack .* or sort the images"),
    "annotations empty": (
        put(ANNOTATIONS),
        rf"{ANNOTATIONS} has no line for the image val_0.JPEG, val_1.JPEG, val_2.JPEG; it is empty: {AGAIN}",
    ),
    "annotations no text": (
        put(ANNOTATIONS, b"\xff\xfe\0"),
        rf"{ANNOTATIONS} cannot be read \(.*\); it looks like UTF-16.*iconv",
    ),
    "annotations cut short": (
        annotated(*LINES[:2], "val_2.JPEG\tn0"),
        rf"{ANNOTATIONS} names no class .* in line 3: .*correct",
    ),
    "annotations without tabs": (
        annotated("val_0.JPEG n01 0", *LINES[1:]),
        r"has no tab behind .* in line 1: 'val_0.JPEG n01 0'; unp",
    ),
    "annotations of another class": (
        annotated(LINES[0], "val_1.JPEG\tn99\t0", LINES[2]),
        r"names no class .* in line 2: .*n99.*corr",
    ),
    "annotations of no image": (
        annotated(*LINES, "val_9.JPEG\tn01\t0"),
        r"names the image val_9.JPEG, which is not in .* line 4: .*",
    ),
    "annotations twice": (annotated(*LINES, LINES[0]), r"names the image val_0.JPEG a second time in line 4: .*; unpack"),
    "an image not annotated": (
        jpeg("val/images/val_3.JPEG"),
        rf"{ANNOTATIONS} has no line for the image val_3.JPEG; .*add the lines",
    ),
    "sorted, and a folder more": (
        both(
            remove(*(f"val/images/val_{row}.JPEG" for row in range(3))),
            *(jpeg(f"val/{wnid}/a.JPEG") for wnid in (*WNIDS, "n04")),
        ),
        r"val has folders that are no class: n04; move them out",
    ),
    "sorted, and a class less": (
        both(remove(*(f"val/images/val_{row}.JPEG" for row in range(3))), *(jpeg(f"val/{wnid}/a.JPEG") for wnid in WNIDS[:2])),
        r"val/n03 has no images .*; unpack the data set again",
    ),
}

TEXT: dict[str, tuple[Change, str]] = {
    "nothing": (
        remove("train.jsonl", "validation.jsonl"),
        r"no file in .* is of a kind that can be read .*: it is empty; convert",
    ),
    "other kinds alone": (
        both(remove("train.jsonl", "validation.jsonl"), put("a.csv"), put("b.csv"), put("c.pdf")),
        r"no file in .* can be read \(.txt, .jsonl.*\): it holds .csv \(2\), .pdf \(1\); convert or unpack",
    ),
    "validation alone": (
        remove("train.jsonl"),
        r"has no text to train on: .* say val, and none says train; put the training text",
    ),
    "no training text beside others": (
        both(remove("train.jsonl"), put("book.txt", "text")),
        r"has no text to train on: .* none says train \(book.txt\); put the training text into a folder `train`",
    ),
    "two splits in a name": (put("train_test.txt", "a"), r"the name train_test.txt says two splits, train and test; rename"),
    "two splits in folders": (
        put("dev-corpus/train/a.txt", "a"),
        r"dev-corpus/train/a.txt says two splits, train and val; rename.*DIR",
    ),
    "UTF-16": (
        put("train.txt", "Größe".encode("utf-16")),
        r"train.txt is not UTF-8: byte 0xff in line 1; it looks like UTF-16: convert",
    ),
    "UTF-16 without a mark": (
        put("train.txt", "ab".encode("utf-16-le")),
        r"train.txt has a character of code 0 in line 1.*; convert",
    ),
    "Latin-1": (
        put("train.txt", "a\nb\nGröße".encode("latin-1")),
        r"train.txt is not UTF-8: byte 0xf6 in line 3; convert it.*LATIN1",
    ),
    "binary": (
        put("train.txt", b"a\nb\0c"),
        r"train.txt has a character of code 0 in line 2: it is no text.*; convert .*move it out",
    ),
    "records in Latin-1": (
        put("train.jsonl", RECORDS.encode() + b'{"text": "\xe9"}'),
        r"train.jsonl is not UTF-8: byte 0xe9 in line 13",
    ),
    "records in UTF-16": (
        put("train.jsonl", RECORDS.encode("utf-16")),
        r"train.jsonl is not UTF-8: .* line 1; it looks like UTF-16: convert",
    ),
    "the last line cut short": (
        put("train.jsonl", RECORDS[:-10]),
        r"train.jsonl has no JSON record in line 12 \(Unterminated.*\): '.*'; correct the line.*cut short",
    ),
    "a web page": (put("train.jsonl", HTML), rf"train.jsonl has no JSON record in line 1 .*; {PAGE}"),
    "a pointer of Git LFS": (put("train.jsonl", LFS), r"train.jsonl has no JSON .*; it is a pointer of Git LFS.*git lfs pull"),
    "a text that is a pointer of Git LFS": (
        put("train.txt", LFS),
        r"train.txt is no text; it is a pointer of Git LFS.*git lfs pull",
    ),
    "lists for records": (
        put("train.jsonl", '["a"]\n["b"]\n'),
        r"train.jsonl is neither a JSON list .* \(Extra data.*\); correct it",
    ),
    "a list of texts": (
        put("train.json", '["a", "b"]'),
        r"record 0 .* of .*train.json is a text \('a'\) and not an object; write rec",
    ),
    "a number for a record": (
        put("train.jsonl", "1\n"),
        r"line 1 of .*train.jsonl is a number \(1\) and not an object; write records",
    ),
    "a list cut short": (put("train.json", '[{"text": "a"},'), r"train.json is neither a JSON list .*; correct it.*cut short"),
    "no such column": (
        put("train.jsonl", lines({"body": "a"})),
        r"line 1 of .*train.jsonl: there is no 'text', but body; write `text_c",
    ),
    "an object without a column": (
        put("train.jsonl", "{}\n"),
        r"line 1 of .*train.jsonl: there is no 'text', but nothing; write",
    ),
    "null": (
        put("train.jsonl", f"{RECORDS}\n" + '{"text": null}'),
        r"line 14 of .*train.jsonl: 'text' is null; give it a text, or le",
    ),
    "a number for a text": (
        put("train.jsonl", lines({"text": 3})),
        r"line 1 of .*: 'text' is a number \(3\) and not a text; write it",
    ),
    "a list for a text": (
        put("train.jsonl", lines({"text": ["a"]})),
        r"line 1 of .*: 'text' is a list \(\['a'\]\) and not a text",
    ),
    "half a character": (
        put("train.jsonl", '{"text": "\\ud83d"}\n'),
        r"line 1 of .*: 'text' has half a character \(\\ud83d.*\); take",
    ),
    "columns for records": (
        put("train.json", '{"text": ["a", "b"]}'),
        r"line 1 of .*train.json: 'text' is a list .*; write it",
    ),
    "records within an object": (
        put("train.json", '{"data": [{"text": "a"}]}'),
        r"train.json: there is no 'text', but data; write",
    ),
    "of another use": (
        put("train/package.json", '{\n"name": "a"\n}'),
        r"package.json: there is no 'text', but name; .*move the file out",
    ),
    "parquet empty": (put("train.parquet"), rf"train.parquet cannot be read \(.*\); it is empty: {AGAIN}"),
    "parquet a web page": (put("train.parquet", HTML), rf"train.parquet cannot be read \(.*\); {PAGE}"),
    "parquet cut short": (
        both(parquet("train.parquet", text=TEXTS), cut("train.parquet", -20)),
        rf"train.parquet cannot .*; {AGAIN}",
    ),
    "parquet without the column": (
        parquet("train.parquet", a=[1], b=[2]),
        r"train.parquet: there is no 'text', but a, b; write `text_",
    ),
    "parquet of another type": (
        parquet("train.parquet", text=[1, 2]),
        r"record 0 .*train.parquet: 'text' is a number \(1\) and not a te",
    ),
    "parquet with bytes": (
        parquet("train.parquet", text=[b"a"]),
        r"record 0 .*train.parquet: 'text' is bytes \(b'a'\) and not a text",
    ),
    "parquet with null": (
        parquet("train.parquet", text=["a", None]),
        r"record 1 \(counted from 0\) of .*train.parquet: 'text' is null;",
    ),
    "gzip cut short": (
        put("train.txt.gz", gzip.compress(b"a" * 99)[:-9]),
        rf"train.txt.gz cannot be read \(Compressed.*\); {AGAIN}",
    ),
    "gzip that is none": (
        both(remove("train.jsonl"), put("train.jsonl.gz", RECORDS)),
        rf"train.jsonl.gz cannot be read \(Not a gzip.*\); {AGAIN}",
    ),
    "gzip without its ending": (
        put("train.jsonl", gzip.compress(RECORDS.encode())),
        r"train.jsonl is not UTF-8.*; .*gzip: unpack it",
    ),
    "zstd": (
        put("train.jsonl.zst", b"\x28\xb5\x2f\xfd"),
        r"train.jsonl.zst is compressed in a way that is not read; unpack it",
    ),
    "zip": (put("train.txt.zip", b"PK\x03\x04"), r"train.txt.zip is compressed in a way that is not read; unpack it"),
    "parquet in gzip": (
        put("train.parquet.gz", b"\x1f\x8b"),
        r"train.parquet.gz is compressed in a way that is not read; unpack it",
    ),
    "training text blank": (
        put("train.jsonl", lines({"text": " "})),
        r"the train split has no text: .*train.jsonl; give it text, or re",
    ),
    "validation empty": (
        put("validation.jsonl"),
        r"the val split has no text: .*validation.jsonl; give it text, or remove its files",
    ),
    "a link to nothing": (
        lambda folder: (folder / "test").symlink_to("/not/mounted"),
        r"test is a link that leads nowhere .*remove the",
    ),
    "a link to itself": (
        lambda folder: (folder / "a.txt").symlink_to("a.txt"),
        r"a.txt is a link that leads nowhere .*remove the link",
    ),
    "a pipe": (lambda folder: os.mkfifo(folder / "train.txt"), r"train.txt is no file but a pipe or a device: move it out"),
    "a name with a line break": (put("train 1\n.txt", b"\xff"), r"train 1\\n.txt' is not UTF-8: byte 0xff in line 1; convert"),
    "a name that is no UTF-8": (
        lambda folder: (folder / os.fsdecode(b"train \xff.txt")).write_bytes(b"\xff"),
        r"train \\udcff.txt' is not UTF-8: byte 0xff in line 1; convert",
    ),
    "too little to train on": (
        put("train.jsonl", lines({"text": "a"})),
        r"train split has [12] tokens, which do not fill one block of 8",
    ),
}

HERE = "eli5_category/train/0000.jsonl"
BY_HAND = "download the folders of https://huggingface.co/datasets/rexarski/eli5_category.*eli5_category"


def of_eli5(*records: Any) -> Change:
    return put(HERE, ONE_ANSWER + lines(*records))


ONE_ANSWER = lines(answers("Because."))
ELI5: dict[str, tuple[Change, str]] = {
    "not there": (
        lambda folder: (folder / "eli5_category").rename(folder / "x"),
        rf"ELI5-Category is not in .*data.download.*{BY_HAND}",
    ),
    "no training": (remove(HERE, "eli5_category/train"), rf"ELI5-Category is not in .*train and validation.*{BY_HAND}"),
    "no validation": (
        remove("eli5_category/validation1/0000.jsonl", "eli5_category/validation2/0000.jsonl"),
        rf"ELI5-Category is not in .*{BY_HAND}",
    ),
    "other kinds alone": (
        both(lambda folder: (folder / "eli5_category").rename(folder.parent / "x"), put("train.csv"), put("validation.csv")),
        rf"ELI5-Category is not in .*{BY_HAND}",
    ),
    "another data set": (
        of_eli5({"text": "a"}),
        r"line 2 of .*0000.jsonl: there is no list .* 'answers' .*\(columns: text\); move",
    ),
    "answers null": (of_eli5({"answers": None}), r"line 2 of .*: there is no list of texts in 'answers'.*; move the file out"),
    "answers a text": (of_eli5({"answers": "a"}), r"line 2 of .*: there is no list of texts in 'answers'.*; move the file out"),
    "answers without text": (
        of_eli5({"answers": {"score": [1]}}),
        r"line 2 of .*: there is no list of texts in 'answers'.*; move",
    ),
    "one text for the answers": (
        of_eli5({"answers": {"text": "abc"}}),
        r"line 2 of .*: there is no list of texts in 'answers'",
    ),
    "an answer null": (of_eli5(answers("a", None)), r"line 2 of .*: 'answers.text\[1\]' is null; give it a text, or leave"),
    "an answer a number": (
        of_eli5(answers(1)),
        r"line 2 of .*: 'answers.text\[0\]' is a number \(1\) and not a text; write it",
    ),
    "a list for a record": (
        put(HERE, ONE_ANSWER + "[1]\n"),
        r"line 2 of .*0000.jsonl is a list \(\[1\]\) and not an object; wri",
    ),
    "cut short": (put(HERE, ANSWERS[:-20]), r"0000.jsonl has no JSON record in line 12 .*; correct the line"),
    "a web page": (put(HERE, HTML), rf"0000.jsonl has no JSON record in line 1 .*; {PAGE}"),
    "a pointer of Git LFS": (put("eli5_category/train/0001.parquet", LFS), r"0001.parquet cannot be read .*; .*git lfs pull"),
    "Latin-1": (put(HERE, ANSWERS.encode() + b"\xe9"), r"0000.jsonl is not UTF-8: byte 0xe9 in line 13; convert"),
    "empty": (put(HERE), r"the train split has no text: .*0000.jsonl; give it text"),
    "empty parquet": (put("eli5_category/train/0001.parquet"), rf"0001.parquet cannot be read .*; it is empty: {AGAIN}"),
    "parquet without answers": (
        parquet("eli5_category/train/1.parquet", text=["a"]),
        r"1.parquet: there is no list .*\(columns: text\)",
    ),
    "no answers at all": (put(HERE, lines(answers())), r"the train split has no text: .*0000.jsonl; give it text"),
    "zstd": (put("eli5_category/train/1.jsonl.zst"), r"1.jsonl.zst is compressed in a way that is not read; unpack it"),
    "a link to nothing": (
        lambda folder: (folder / "eli5_category/x").symlink_to("y"),
        r"x is a link that leads nowhere .*remove",
    ),
}

BROKEN = {
    "fashion_mnist": FASHION_MNIST,
    "cifar10": CIFAR_10,
    "cifar100": CIFAR_100,
    "tiny_imagenet": TINY_IMAGENET,
    "text": TEXT,
    "eli5": ELI5,
}
ROWS = [(data, row) for data, rows in BROKEN.items() for row in rows]


def broken(data: str, row: str, folder: Path) -> str:
    """Make the folder of a row; returns the message that it must lead to."""
    change, message = BROKEN[data][row]
    folder.mkdir()
    DATA_SETS[data].write(folder)
    change(folder)
    return message


# --- what is read all the same: a change of a good folder that changes nothing in what is read

JUNK = both(
    *(put(name, "junk") for name in (".DS_Store", "._x", "Thumbs.db", ".git/HEAD", "__MACOSX/._x", "README.md", "LICENSE"))
)


def gzipped(*names: str) -> Change:
    return lambda folder: [
        ((folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes())), (folder / name).unlink())
        for name in names
    ]


def moved(*pairs: tuple[str, str]) -> Change:
    def move(folder: Path) -> None:
        for old, new in pairs:
            (folder / new).parent.mkdir(parents=True, exist_ok=True)
            (folder / old).rename(folder / new)

    return move


def as_array(folder: Path) -> None:
    """A batch pickled anew, its labels an array."""
    path = folder / "cifar-10-batches-py/data_batch_2"
    entry = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(entry | {"labels": np.array(entry["labels"])}, protocol=5))


FINE: dict[str, dict[str, Change]] = {
    "fashion_mnist": {
        "junk": JUNK,
        "gzip": gzipped(*IDX),
        "some of them gzip": gzipped(TRAIN_IMAGES, TEST_LABELS),
        "both, the gzip broken": put(f"{TRAIN_IMAGES}.gz", HTML),
        "torchvision's folder": moved(*((name, f"FashionMNIST/raw/{name}") for name in IDX)),
        "torchvision's raw folder": moved(*((name, f"raw/{name}") for name in IDX)),
    },
    "cifar10": {
        "junk": both(JUNK, lambda folder: JUNK(folder / "cifar-10-batches-py")),
        "no batches.meta, and a readme": put("cifar-10-batches-py/readme.html", HTML),
        "pickled anew": as_array,
        "the archive beside it": put("cifar-10-python.tar.gz", HTML),
    },
    "cifar100": {
        "junk": both(JUNK, lambda folder: JUNK(folder / "cifar-100-python")),
        "meta broken": put("cifar-100-python/meta"),
    },
    "tiny_imagenet": {
        "junk": both(JUNK, *(lambda folder, name=name: JUNK(folder / name) for name in ("train", "val", "val/images"))),
        "junk in a class": lambda folder: JUNK(folder / "train/n02"),
        "checkpoints among the classes": both(
            jpeg("train/.ipynb_checkpoints/n01_0-checkpoint.JPEG"),
            jpeg("train/n01/images/.ipynb_checkpoints/n01_0-checkpoint.JPEG"),
            jpeg("val/images/.ipynb_checkpoints/val_0-checkpoint.JPEG"),
        ),
        "folders of file systems": both(*(jpeg(f"train/{name}/a.JPEG") for name in ("@eaDir", "lost+found", "$RECYCLE.BIN"))),
        "a text among images": put("train/n01/images/notes.txt", "text"),
        "other endings": moved(
            (FIRST, "train/n01/images/n01_0.jpg"), ("train/n01/images/n01_1.JPEG", "train/n01/images/n01_1.PNG")
        ),
        "images beside the boxes": moved((FIRST, "train/n01/n01_0.JPEG")),
        "a grey image": jpeg(FIRST, value=0, mode="L"),
        "a link to a class": both(
            moved(("train/n02", "elsewhere/n02")), lambda folder: (folder / "train/n02").symlink_to(folder / "elsewhere/n02")
        ),
        "a link upwards": lambda folder: (folder / "train/n02/up").symlink_to(".."),
        "annotations of Windows": put(ANNOTATIONS, "\ufeff" + "\r\n".join(LINES) + "\r\n\r\n"),
        "wnids of Windows": put("wnids.txt", "\ufeffn01\r\nn02\r\n\r\nn03"),
        "sorted": moved(*((f"val/images/val_{row}.JPEG", f"val/{wnid}/val_{row}.JPEG") for row, wnid in enumerate(WNIDS))),
        "a cache of something else": put("decoded.pt", HTML),
        "an empty cache": put("decoded.pt"),
        "a cache of another form": lambda folder: torch.save([1, 2], folder / "decoded.pt"),
    },
    "text": {
        "junk": JUNK,
        "JSON of the hub's": both(put("dataset_info.json", "{}"), put("config.json", "[1]"), put("dataset_dict.json", "{")),
        "checkpoints": put(".ipynb_checkpoints/train-checkpoint.jsonl", "broken"),
        "texts about the data": both(put("LICENSE.txt", "a"), put("README.txt", "b"), put("requirements.txt", "c")),
        "other kinds": both(put("train.csv", "a"), put("train.zip", "b")),
        "blank lines": put("train.jsonl", RECORDS.replace("\n", "\r\n\n")),
        "no last line break": put("train.jsonl", RECORDS.rstrip()),
        "a byte order mark": put("train.jsonl", b"\xef\xbb\xbf" + RECORDS.encode()),
        "blank records": put("train.jsonl", RECORDS + lines({"text": ""}, {"text": " \n"})),
        "other columns of several types": put(
            "train.jsonl", lines(*({"text": t, "n": [n, str(n), None][n % 3]} for n, t in enumerate(TEXTS)))
        ),
        "a list": both(
            remove("train.jsonl"), put("train.json", "\n " + json.dumps([{"text": text} for text in TEXTS], indent=1))
        ),
        "a list in one line": put("train.jsonl", json.dumps([{"text": text} for text in TEXTS])),
        "one record a file": both(
            remove("train.jsonl"),
            *(put(f"train-{n:02}.json", json.dumps({"text": text}, indent=1)) for n, text in enumerate(TEXTS)),
        ),
        "one document a file": both(
            remove("train.jsonl", "validation.jsonl"),
            *(put(f"{split}/{n:02}.txt", text) for split in ("train", "validation") for n, text in enumerate(TEXTS)),
        ),
        "parquet": both(remove("train.jsonl"), parquet("train.parquet", id=list(range(12)), text=TEXTS)),
        "parquet with a part without rows": both(
            remove("train.jsonl"), parquet("train-1.parquet", text=TEXTS), parquet("train-2.parquet", text=[])
        ),
        "gzip": gzipped("train.jsonl", "validation.jsonl"),
        "xz and bzip2": both(
            remove("train.jsonl", "validation.jsonl"),
            put("train.jsonl.xz", lzma.compress(RECORDS.encode())),
            put("validation.ndjson.bz2", bz2.compress(RECORDS.encode())),
        ),
        "capitals": moved(("train.jsonl", "Train.JSONL")),
        "training": moved(("train.jsonl", "my-training 2.jsonl")),
        "evaluation beside": both(put("evaluation.jsonl", RECORDS), put("testing.jsonl", RECORDS), put("eval.txt", "text")),
        "a name with quotes": moved(("train.jsonl", "train 'it\"s.jsonl")),
        "a file that is a link": both(
            moved(("train.jsonl", "x/records")), lambda folder: (folder / "train.jsonl").symlink_to("x/records")
        ),
        "a folder that is a link": both(
            moved(("train.jsonl", "../elsewhere/0.jsonl"), ("validation.jsonl", "val/0.jsonl")),
            lambda folder: (folder / "train").symlink_to(folder.parent / "elsewhere"),
        ),
        "a link upwards": lambda folder: (folder / "up").symlink_to("."),
        "an empty file beside": put("train-2.jsonl"),
    },
    "eli5": {
        "junk": both(JUNK, lambda folder: JUNK(folder / "eli5_category/train")),
        "the folder itself": moved(
            *((f"eli5_category/{split}", split) for split in ("train", "validation1", "validation2", "test"))
        ),
        "the hub's folder": moved(
            *((f"eli5_category/{s}", f"eli5_category/default/{s}") for s in ("train", "validation1", "validation2", "test"))
        ),
        "a text beside": put("eli5_category/train/notes.txt", "notes"),
        "another data set beside": put("a_train_test/a.jsonl", "broken"),
        "a question without answers": put(HERE, ANSWERS + lines(answers())),
    },
}


@pytest.mark.parametrize("data, row", [(data, row) for data, rows in FINE.items() for row in rows])
def test_a_reader_reads_all_the_same(data: str, row: str, tmp_path: Path) -> None:
    for name in ("good", "data"):
        (tmp_path / name).mkdir()
        DATA_SETS[data].write(tmp_path / name)
    FINE[data][row](tmp_path / "data")
    assert read(data, tmp_path / "data") == read(data, tmp_path / "good")


# --- refusals


@pytest.mark.parametrize("data, row", ROWS)
def test_a_reader_refuses(data: str, row: str, tmp_path: Path) -> None:
    message = broken(data, row, tmp_path / "data")
    before = names_in(tmp_path / "data")
    with pytest.raises((ValueError, OSError)) as error:
        loaded(data, tmp_path / "data")
    assert re.search(message, str(error.value)), str(error.value)
    assert names_in(tmp_path / "data") == before
    assert not [name for name in names_in(tmp_path / "cache") if "unfinished" in name]


QUICK = {
    "fashion_mnist": ["two of four"],
    "cifar10": ["a pickle with code"],
    "cifar100": ["a label too large"],
    "tiny_imagenet": ["a broken image"],
    "text": ["validation alone"],
    "eli5": ["answers null"],
}


@pytest.mark.parametrize(
    "data, row",
    [pytest.param(data, row, marks=() if row in QUICK[data] else pytest.mark.slow) for data, row in ROWS],
)
def test_bsl_train_refuses_before_the_first_step(data: str, row: str, tmp_path: Path) -> None:
    message = broken(data, row, tmp_path / "data")
    cfg = compose_config(f"data={data}", *DATA_SETS[data].overrides)
    cfg.data.root, cfg.output_dir = str(tmp_path / "data"), str(tmp_path / "run")
    if "cache_dir" in cfg.data:
        cfg.data.cache_dir = str(tmp_path / "cache")
    with pytest.raises((ValueError, OSError)) as error:
        train(cfg)
    assert re.search(message, str(error.value)), str(error.value)
    written = names_in(tmp_path / "run") + names_in(tmp_path / "cache")
    assert not [name for name in written if name.endswith(("plan.csv", "metrics.csv", ".ckpt")) or "unfinished" in name]


def test_there_are_twenty_of_each() -> None:
    assert min(map(len, BROKEN.values())) >= 20
