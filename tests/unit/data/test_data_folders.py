"""Folders and packed files: all of the data is read, or named as passed over."""

from __future__ import annotations

import bz2
import gzip
import lzma

import pyarrow
import pytest

from scale_sft.errors import UserError

row = lambda text: f'{{"prompt": "{text}", "completion": "."}}\n'.encode()


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst}


def test_a_folder_is_read_whole_in_the_order_of_its_paths(put, read, tokenizer, texts, tmp_path):
    import datasets

    put("many/a.JSONL", row("1"))
    put("many/b.jsonl.gz", gzip.compress(row("2")))
    put("many/b.jsonl.zst.not", b"")
    put("many/c.Csv", "prompt,completion\n3,.\n")
    put("many/d/e/f.jsonl.zst", zst(row("4")))
    datasets.Dataset.from_dict({"prompt": ["5"], "completion": ["."]}).save_to_disk(tmp_path / "many/saved")
    put("many/._a.jsonl", b"\0\5\x16\7")
    put("many/.hidden/x.jsonl", row("no"))
    put("many/README.txt", "about")
    put("many/model/config.json", "{}")
    put("many/License.TXT", "about")
    examples = read(tmp_path / "many")
    assert texts(examples, tokenizer) == [f"<s>{n}.</s>" for n in range(1, 6)]
    (note,) = examples.notes
    assert note.endswith("passed over ._a.jsonl, .hidden/, License.TXT, README.txt, b.jsonl.zst.not and 1 more")


def test_a_folder_of_several_splits_is_read_whole_and_that_is_said(put, read, tmp_path):
    put("many/train.jsonl", row("1")), put("many/test.jsonl", row("2"))
    (note,) = read(tmp_path / "many").notes
    assert "all of test.jsonl, train.jsonl are read; name one of them to use it alone" in note


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_files_are_read_and_broken_ones_refused(kind, put, read, tokenizer, texts):
    content = PACKERS[kind](row("a") * 2000)
    examples = read(put(f"rows.jsonl.{kind}", content))
    assert len(examples) == 2000 and texts(examples, tokenizer)[-1] == "<s>a.</s>"
    for number, broken in enumerate([content[:-9], b"not packed" * 9]):
        with pytest.raises(UserError, match=rf"broken{number}\.jsonl\.{kind}: not readable: "):
            read(put(f"broken{number}.jsonl.{kind}", broken))
    with pytest.raises(UserError, match=rf"rows\.jsonl\.{kind}, line 2: not JSON"):
        read(put(f"rows.jsonl.{kind}", PACKERS[kind](row("a") + b"x")))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.txt.doc", "._x.jsonl", "README.txt"], r"holds no data files; .* \(passed over: ._x.jsonl, README.txt, a.txt.doc\)"),
        (["a.jsonl", "a.jsonl.gz"], "holds a.jsonl and a.jsonl.gz, the same data twice; remove one"),
        (["a.parquet.gz"], "holds no data files"),
        ([], "holds no data files"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_meant_is_refused(files, message, put, read, tmp_path):
    (tmp_path / "many").mkdir()
    for name in files:
        put(f"many/{name}", row("a"))
    with pytest.raises(UserError, match=message):
        read(tmp_path / "many")


def test_saved_splits_are_chosen_by_name(read, tokenizer, texts, tmp_path):
    import datasets

    make = lambda text: datasets.Dataset.from_dict({"prompt": [text, text], "completion": ["."] * 2})
    datasets.DatasetDict({"train": make("a"), "dev": make("b")}).save_to_disk(tmp_path / "saved")
    assert texts(read(tmp_path / "saved"), tokenizer) == ["<s>a.</s>"] * 2
    assert texts(read(f"{tmp_path}/saved?split=dev[:1]"), tokenizer) == ["<s>b.</s>"]
    with pytest.raises(UserError, match="no split 'test'; there are: train, dev"):
        read(f"{tmp_path}/saved?split=test")


def test_a_change_in_a_sub_folder_is_a_change_of_the_data(put, read, tmp_path):
    put("many/a.jsonl", row("1")), put("many/b/c.jsonl", row("2"))
    before = read(tmp_path / "many").digest()
    put("many/b/c.jsonl", row("33"))
    assert read(tmp_path / "many").digest() != before


def test_a_source_may_begin_at_home(put, read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put("rows.jsonl", row("a"))
    assert len(read("~/rows.jsonl?weight=2")) == 2
