"""Text is what the file says, byte for byte: no type is guessed, and no row takes anything from another."""

from __future__ import annotations

import datetime
import json

import pytest

from scale_sft.errors import UserError

VALUES = ["0,00000", "00501", "49.50", "TRUE", "2024-01-31", "NA", "None", "null", "nan", "1e5", "0x10", " a ", "é 😀"]


def csv_of(rows) -> str:
    quoted = lambda text: '"' + text.replace('"', '""') + '"'
    return "".join(",".join(map(quoted, row)) + "\n" for row in [("prompt", "completion"), *rows])


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_a_text_is_read_as_it_is_written_alone_and_after_others(kind, value, put, read, tokenizer, tmp_path, texts):
    for rows in ([("zip ", value)], [("name ", "x"), ("zip ", value)]):
        records = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
        if kind == "parquet":
            import datasets

            path = tmp_path / f"{len(rows)}.parquet"
            datasets.Dataset.from_list(records).to_parquet(path)
        else:
            content = {"csv": csv_of(rows), "json": json.dumps(records)}.get(kind, records)
            path = put(f"{len(rows)}.{kind}", content)
        assert texts(read(path), tokenizer)[-1] == f"<s>zip {value}</s>"


def test_types_do_not_change_after_many_rows(put, read, tokenizer, texts):
    rows = [(f"name {n}", f"n {n}") for n in range(10_000)] + [("zip", "0,00000"), ("price", "49.50"), ("flag", "TRUE")]
    last = texts(read(put("many.csv", csv_of(rows))), tokenizer)[-3:]
    assert last == ["<s>zip0,00000</s>", "<s>price49.50</s>", "<s>flagTRUE</s>"]


def test_dates_after_ten_megabytes_stay_text(put, read, tokenizer):
    filler = "x" * 50_000
    rows = [{"prompt": filler, "completion": "a", "input": None, "unused": None} for _ in range(220)]
    rows += [{"prompt": "day ", "completion": "2024-01-31", "input": "", "unused": {"a": 1}}]
    examples = read(put("dates.jsonl", rows), max_length=60_000)
    assert tokenizer.decode(examples.tokens(220)[0]) == "<s>day 2024-01-31</s>"


@pytest.mark.parametrize(
    ("value", "kind"),
    [(5, "int"), (49.5, "float"), (True, "bool"), (["a"], "list"), ({"a": 1}, "dict"), (None, "miss")],
)
def test_a_json_value_that_is_no_text_is_refused_by_name_and_line(value, kind, put, read):
    path = put("rows.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": value}])
    with pytest.raises(UserError, match=f"line 2: field 'output' is {kind}"):
        read(path)


def test_columns_that_no_format_uses_may_hold_anything(put, read, tokenizer, tmp_path, texts):
    import datasets

    rows = [{"prompt": "a", "completion": "b", "text": text} for text in (1, "x", None, [1], {"k": "v"})]
    assert texts(read(put("rows.jsonl", rows)), tokenizer) == ["<s>ab</s>"] * 5
    day = datetime.datetime(2024, 1, 31)
    odd = {"prompt": ["a"], "completion": ["b"], "text": [day], "messages": [day]}
    datasets.Dataset.from_dict(odd).to_parquet(tmp_path / "odd.parquet")
    assert texts(read(f"{tmp_path}/odd.parquet?format=prompt_completion"), tokenizer) == ["<s>ab</s>"]
    with pytest.raises(UserError, match="example 1: field 'text' is datetime, expected text"):
        read(f"{tmp_path}/odd.parquet?format=text", loss_on="all")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,completion\na,b\nc\n", "line 3: got 1 fields, expected 2"),
        ("prompt,completion\na,b\nc,d,e\n", "line 3: got 3 fields, expected 2"),
        ('prompt,completion\na,b\n"c,d\n', "line 3: not CSV: unexpected end of data"),
        ('prompt,completion\n"a"b,c\n', "line 2: not CSV"),
        ("prompt,completion,prompt\na,b,c\n", "two columns are called 'prompt'"),
        (b"prompt,completion\na,\xff\n", "line 2: not UTF-8"),
        ("prompt,completion\na,b\0\n", "line 2: holds a NUL byte at column 4"),
        ("a,b\nprompt,completion\n", "expected the fields .*; got a, b"),
        ("prompt,completion\n", "holds no examples"),
        ("prompt,completion\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_a_broken_csv_file_is_refused_with_its_line(content, message, put, read):
    with pytest.raises(UserError, match=message):
        read(put("rows.csv", content))


def test_csv_keeps_line_ends_inside_quotes_long_fields_and_names_lines(put, read, tokenizer, texts):
    long = "y" * 200_000
    path = put("rows.csv", b'\xef\xbb\xbfprompt,completion\r\n"a\r\nb","c ""d"""\r\n\r\ne,' + long.encode() + b"\r\n")
    examples = read(path, max_length=300_000)
    assert texts(examples, tokenizer) == ['<s>a\r\nbc "d"</s>', f"<s>e{long}</s>"]
    with pytest.raises(UserError, match="line 4: no token to learn from: its completion is empty"):
        read(put("empty.csv", 'prompt,completion\n"a\nb",c\nd,\n'))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "completion": "b", "prompt": "c"}\n', "line 1: field 'prompt' is written twice"),
        ('[{"prompt": "a", "completion": "b"},\n {"prompt": }]', "line 2: not JSON"),
        ('[{"prompt": "a", "completion": "b"}', "not JSON: Expecting ']'"),
        ('[{"prompt": "a", "completion": "b"}] x', "not JSON: Extra data"),
        ('[{"prompt": "a", "completion": "b"}, 3]', "example 2: expected a JSON object, got int"),
        ("[" * 100_000, "brackets nested too deeply"),
        ("null\n", "line 1: expected a JSON object, got null"),
        ('{"prompt": "a", "completion": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ('{"prompt": "a", "completion": "b"}\n'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "x\\ud83dy"}', r"line 2: holds \\ud83d"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "bytes",
)
def test_broken_json_is_refused_with_its_place(content, message, put, read):
    with pytest.raises(UserError, match=message):
        read(put("rows.json", content))


def test_half_a_character_in_a_field_that_no_one_uses_is_no_error(put, read, tokenizer, texts):
    path = put("rows.jsonl", '{"prompt": "a", "completion": "\\ud83d\\ude00", "note": "\\ud83d"}')
    assert texts(read(path), tokenizer) == ["<s>a😀</s>"]


def test_objects_over_several_lines_and_in_an_array_are_read(put, read, tokenizer, texts):
    row = json.dumps({"prompt": "a", "completion": "b"}, indent=2)
    for content in (row, row + "\n" + row, f"[{row},\n{row}]"):
        assert set(texts(read(put("rows.json", content)), tokenizer)) == {"<s>ab</s>"}


def test_text_files_lose_their_mark_and_blank_lines_and_nothing_else(put, read, tokenizer, texts):
    path = put("lines.txt", b"\xef\xbb\xbf one \r\n\n \t\ntwo\n\n")
    assert texts(read(path, loss_on="all"), tokenizer) == ["<s> one </s>", "<s>two</s>"]


def test_lines_of_old_macs_are_lines(put, read, tokenizer, texts):
    assert texts(read(put("a.txt", b"one\rtwo\r\r"), loss_on="all"), tokenizer) == ["<s>one</s>", "<s>two</s>"]
    path = put("a.csv", b'prompt,completion\ra,b\r"c\rd",e\r')
    assert texts(read(path), tokenizer) == ["<s>ab</s>", "<s>c\rde</s>"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("binary", "example 1: field 'prompt' is bytes, expected text"),
        ("null", "example 2: field 'prompt' is missing"),
        ("number", "example 1: field 'completion' is int, expected text in quotes"),
        ("category", None),
    ],
)
def test_parquet_columns_are_text_or_refused(kind, message, put, read, tokenizer, texts, tmp_path):
    import pyarrow.parquet

    prompt, completion = {
        "binary": ([b"a"], ["b"]),
        "null": (["a", None], ["b", "c"]),
        "number": (["a"], [5]),
        "category": (pyarrow.array(["a", "a"]).dictionary_encode(), ["b", "b"]),
    }[kind]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompt, "completion": completion}), path)
    if message is None:
        assert texts(read(path), tokenizer) == ["<s>ab</s>"] * 2
        return
    with pytest.raises(UserError, match=message):
        read(path)


def test_rows_are_kept_by_what_the_file_says(put, read):
    path = put("rows.csv", "prompt,completion,kind\na,b,01\na,b,1\na,b,NA\n")
    assert [len(read(f"{path}?keep=kind:{kind}")) for kind in ("01", "1", "NA")] == [1, 1, 1]
    path = put("rows.jsonl", [{"prompt": "a", "completion": "b", "good": good} for good in (True, False, None)])
    assert [len(read(f"{path}?keep=good:{kind}")) for kind in ("true", "True", "null")] == [1, 1, 1]
