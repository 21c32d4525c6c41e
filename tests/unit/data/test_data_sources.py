"""Files as people have them: each is read correctly, or refused with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scale_sft.config.options import DataConfig
from scale_sft.data.cache import load_examples
from scale_sft.data.opening import open_sources
from scale_sft.data.sources import parse_sources
from scale_sft.errors import UserError

ROW = b'{"prompt": "a", "completion": "b"}'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.fixture
def load(tokenizer, tmp_path):
    def load(source, limit=None, **options):
        config = DataConfig(**{"max_length": 100, "cache_dir": str(tmp_path / "cache"), **options})
        return load_examples(
            source if isinstance(source, (str, list)) else str(source), "train", tokenizer, config, limit
        )

    return load


@pytest.fixture
def file(tmp_path):
    def write(content: bytes | str, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (ROW + b'\n{"prompt": "a", "compl\n' + ROW, r"rows\.jsonl, line 2: not JSON"),
        (
            ROW + b'\n\n{"prompt": 5, "completion": "b"}\n',
            r"rows\.jsonl, line 3: field 'prompt' is int, expected text in quotes",
        ),
        (ROW + b'\n{"prompt": 5, "completion": "b"}\n', r"rows\.jsonl, line 2: field 'prompt' is int, expected text"),
        (ROW + b'\n{"prompt": "a"}\n', r"rows\.jsonl, line 2: field 'completion' is missing"),
        (ROW + b'\n{"prompt": "a", "completion": ""}\n', r"rows\.jsonl, line 2: .* its completion is empty"),
        (ROW + b"\n[1, 2]\n", r"rows\.jsonl, line 2: expected a JSON object, got list"),
        (b"", r"rows\.jsonl is empty"),
        (b"\n\n", r"rows\.jsonl holds no examples"),
        (ROW + b'\n{"prompt": "a\x00c", "completion": "b"}\n', r"rows\.jsonl, line 2: holds a NUL byte at column 14"),
        (ROW + b"\n" + b"\x00" * 64, r"rows\.jsonl, line 2: holds a NUL byte at column 1"),
        (ROW + b'\n{"prompt": "\xff", "completion": "b"}\n', r"rows\.jsonl, line 2: not UTF-8: .* at byte 13"),
        (b'{"ask": "a", "reply": "b"}', r"expected the fields messages; prompt and completion; .*; got ask, reply"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:30],
)
def test_a_broken_file_is_refused_with_its_line(lines, message, file, load):
    with pytest.raises(UserError, match=message):
        load(file(lines))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "bot", "content": "a"}]}, "line 2: turn 1 has the unknown role 'bot'; expected system"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "line 2: no token to learn from: the conversation has no assist",
        ),
        ({"messages": "hello"}, "line 2: expected a list of turns, got str 'hello'"),
        ({"messages": []}, "line 2: expected a list of turns"),
        ({"messages": None}, "line 2: expected a list of turns, got nothing"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            r"line 2: the content of turn 1 \(user\) is int, expected text",
        ),
        ({"messages": [{"from": "human", "value": "a"}]}, "line 2: turn 1 has from and value; rename them"),
    ],
)
def test_a_broken_conversation_is_refused_with_its_line(row, message, file, load):
    with pytest.raises(UserError, match=r"rows\.jsonl, " + message):
        load(file(f"{CHAT}\n{json.dumps(row)}\n"))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + ROW + b"\n" + ROW + b"\n",
        ROW + b"\r\n" + ROW + b"\r\n",
        ROW + b"\n\n   \n" + ROW,
        b"[" + ROW + b",\n" + ROW + b"]",
    ],
    ids=["byte order mark", "CRLF", "blank lines", "one array"],
)
def test_oddities_of_files_are_read_correctly(content, file, load, tokenizer):
    examples = load(file(content))
    assert [tokenizer.decode(examples.tokens(n)[0]) for n in range(2)] == ["<s>ab</s>"] * 2


def test_a_line_of_ten_megabytes_and_an_escaped_nul_are_read(file, load, tokenizer):
    long = json.dumps({"prompt": "c", "completion": "b", "notes": "x" * 10_000_000}).encode()
    examples = load(file(ROW + b"\n" + long + b"\n" + b'{"prompt": "a\\u0000", "completion": "b"}\n'))
    texts = [tokenizer.decode(examples.tokens(n)[0]) for n in range(len(examples))]
    assert texts == ["<s>ab</s>", "<s>cb</s>", "<s>a\0b</s>"]


def test_csv_parquet_text_and_folders_of_them_are_read(file, load, tokenizer, tmp_path):
    import datasets

    (tmp_path / "many").mkdir()
    file('prompt,completion\na,b\n"a,\n2",b\n', "many/1.csv")
    datasets.Dataset.from_dict({"prompt": ["c"], "completion": ["d"]}).to_parquet(tmp_path / "many/2.parquet")
    file(ROW, "many/3.jsonl")
    file("not data", "many/readme.md")
    examples = load(tmp_path / "many")
    texts = [tokenizer.decode(examples.tokens(n)[0]) for n in range(len(examples))]
    assert texts == ["<s>ab</s>", "<s>a,\n2b</s>", "<s>cd</s>", "<s>ab</s>"]
    assert len(load(file("one\ntwo\n", "lines.txt"), loss_on="all")) == 2
    with pytest.raises(UserError, match="line 3: no token to learn from: its completion is empty"):
        load(file("prompt,completion\na,b\nc,\n", "holes.csv"))


def numbered(file, name: str, count: int) -> str:
    return str(
        file("".join(json.dumps({"prompt": f"{name}{n}", "completion": "."}) + "\n" for n in range(count)), name)
    )


@pytest.fixture
def prompts(tmp_path):
    def get(sources, limit=None, streaming=False) -> list[str]:
        parts = open_sources(parse_sources(sources, "train"), "train", limit, streaming, scratch=tmp_path / "scratch")
        return [json.loads(row)["prompt"] for part in parts for row in part.rows["row"]]

    return get


def test_sources_are_mixed_by_weight(file, prompts):
    a, b = numbered(file, "a.jsonl", 8), numbered(file, "b.jsonl", 4)
    mixed = prompts([f"{a}?weight=0.5", f"{b}?weight=2"])
    assert len(mixed) == 12
    assert len({row for row in mixed if row.startswith("a")}) == 4
    assert all(mixed.count(f"b.jsonl{n}") == 2 for n in range(4))
    assert mixed == prompts([f"{a}?weight=0.5", f"{b}?weight=2"])


def test_a_limit_takes_from_each_source_by_its_share(file, prompts):
    a, b = numbered(file, "a.jsonl", 8), numbered(file, "b.jsonl", 4)
    assert prompts([a, b], limit=6) == [f"a.jsonl{n}" for n in range(4)] + ["b.jsonl0", "b.jsonl1"]


def test_slices_count_over_the_files_of_a_folder(file, tmp_path, prompts):
    (tmp_path / "two").mkdir()
    numbered(file, "two/a.jsonl", 4), numbered(file, "two/b.jsonl", 4)
    assert prompts(f"{tmp_path}/two?split=train[3:6]") == ["two/a.jsonl3", "two/b.jsonl0", "two/b.jsonl1"]
    assert len(prompts(f"{tmp_path}/two?split=train[50%:]")) == 4


def test_rows_can_be_kept_by_a_column_and_still_know_their_lines(file, load):
    rows = [{"kind": kind, "prompt": "a", "completion": text} for kind, text in [("x", "1"), ("y", ""), ("y", "3")]]
    source = file("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load(f"{source}?keep=kind:x")) == 1
    with pytest.raises(UserError, match="line 2: .*completion is empty"):
        load(f"{source}?keep=kind:y")
    with pytest.raises(UserError, match="unknown column 'kid'; did you mean 'kind'"):
        load(f"{source}?keep=kid:y")


def test_streaming_reads_only_the_first_examples(file, prompts):
    rows = b"".join(ROW.replace(b"a", b"%d" % n) + b" " * 1000 + b"\n" for n in range(40_000))
    source = str(file(rows + b"broken\n"))
    assert prompts(source, limit=20, streaming=True) == [str(n) for n in range(20)]
    with pytest.raises(UserError, match="say how many: max_train_examples"):
        prompts(source, streaming=True)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("rows.jsonl?wieght=2", "unknown key 'wieght'; did you mean 'weight'"),
        ("rows.jsonl?weight=0", "weight is '0', expected a number above 0"),
        ("rows.jsonl?format=chat", "unknown format 'chat'"),
        ("rows.jsonl?split", "expected split=VALUE"),
        ("missing.jsonl", "no such file: missing.jsonl"),
        ("rows.xml", "no such file"),
    ],
)
def test_a_source_that_is_written_wrongly_is_refused(written, message, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file(ROW)
    with pytest.raises(UserError, match=message):
        parse_sources(written, "train")


def test_a_hub_data_set_that_cannot_be_reached_is_an_error_with_its_name(load):
    with pytest.raises(UserError, match="'nobody/nothing' is neither a file here nor a data set that the hub gave"):
        load("nobody/nothing?subset=main&split=train[:10]")
