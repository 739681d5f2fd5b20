"""Every format is read as it is written, and a broken file is named with its line."""

import csv
import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from loralloc.tasks.source import read_table

ROWS = [
    {"text": "\u00e9clair \u2028 \U0001f600", "label": "yes"},
    {"text": "\u05e9\u05dc\u05d5\u05dd", "label": "no"},
]


def as_json(rows):
    return json.dumps(rows, indent=1)


def as_lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def as_csv(rows):
    return "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", as_json(ROWS)),
        ("lines.json", as_lines(ROWS)),
        ("rows.jsonl", as_lines(ROWS)),
        ("array.jsonl", " \n" + as_json(ROWS)),
        ("gaps.jsonl", as_lines(ROWS).replace("\n", "\n\n") + "\n\n"),
        ("bom.jsonl", "\ufeff" + as_lines(ROWS)),
        ("rows.csv", as_csv(ROWS)),
        ("gaps.csv", as_csv(ROWS) + "\n"),
        ("windows.csv", as_csv(ROWS).replace("\n", "\r\n")),
        ("UPPER.JSONL", as_lines(ROWS)),
    ],
)
def test_the_same_rows_come_out_of_every_text_format(write, name, content):
    assert read_table(write(name, content)).to_list() == ROWS


def test_parquet_keeps_its_rows_and_label_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = [{"text": row["text"], "label": number} for number, row in enumerate(ROWS)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    table = read_table(tmp_path / "rows.parquet")
    assert table.to_list() == rows
    assert table.features["label"].names == ["no", "yes"]


def test_values_stay_as_they_are_written(write):
    path = write("rows.csv", "text,code,n\n2024-01-31,007,-3\nNA,12,0\n,5,21\n")
    assert read_table(path).to_dict() == {
        "text": ["2024-01-31", "NA", ""],
        "code": ["007", "12", "5"],
        "n": ["-3", "0", "21"],
    }
    path = write("rows.jsonl", [{"text": "2024-01-31"}, {"text": "2024-01-31T10:00:00"}])
    assert read_table(path)["text"][:] == ["2024-01-31", "2024-01-31T10:00:00"]


def test_a_field_that_some_rows_lack_is_none(write):
    table = read_table(write("rows.jsonl", [{"a": "x"}, {"b": "y", "a": "z"}]))
    assert table.to_list() == [{"a": "x", "b": None}, {"a": "z", "b": "y"}]


def test_a_column_may_mix_types(write):
    rows = [{"a": "x", "b": [{"role": "u", "content": "t"}]}, {"a": 3, "b": "y"}]
    assert read_table(write("rows.jsonl", rows)).to_list() == rows


def test_csv_reads_long_fields_and_leaves_the_limit_of_the_csv_module_alone(write):
    limit = csv.field_size_limit()
    table = read_table(write("long.csv", "text\n" + "x" * (limit + 1) + "\n"))
    assert len(table[0]["text"]) == limit + 1
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.jsonl", '{"a": 1}\n\n{"a": }\n', "bad.jsonl, line 3, is not valid JSON: Expecting"),
        ("bad.json", '[{"a": 1},\n {"a" 2}]', "bad.json, line 2, is not valid JSON: Expecting"),
        ("cut.json", '[{"a": 1},\n', "cut.json, line 2, is not valid JSON"),
        (
            "flat.jsonl",
            '{"a": 1}\n"two"\n',
            "flat.jsonl, line 2, must be a JSON object and is 'two'",
        ),
        ("flat.json", '[{"a": 1}, 5]', "flat.json, item 2, must be a JSON object and is 5"),
        ("wide.csv", "a,b\n1,2\n1,2,3\n", "wide.csv, line 3, has 3 fields where the header has 2"),
        ("thin.csv", "a,b\n1\n", "thin.csv, line 2, has 1 fields where the header has 2"),
        ("quote.csv", 'a,b\n"1,2\n', "quote.csv, line 2, is not valid CSV: unexpected end of data"),
        ("twice.csv", "a,b,a\n1,2,3\n", "twice.csv names a column twice in its header: a, b, a"),
        (
            "latin.jsonl",
            '{"a": "\u00e9clair"}'.encode("latin-1"),
            "latin.jsonl is not UTF-8 text; save it",
        ),
        ("latin.csv", "a\n\u00e9clair\n".encode("latin-1"), "latin.csv is not UTF-8 text; save it"),
        ("not.parquet", b"hello", "not.parquet is not a Parquet file"),
        ("cut.parquet", b"PAR1 and then nothing", "cut.parquet cannot be read as Parquet: "),
        (
            "object.json",
            json.dumps({"version": 1, "data": ROWS, "authors": ["a"]}, indent=1),
            "object.json holds one JSON object over several lines, where rows are wanted as an "
            "array of objects or as one object a line; they may be what it has under 'data'.",
        ),
        ("row.json", json.dumps({"text": "a"}, indent=1), "rows are wanted as an array of objects"),
        ("huge.jsonl", '{"a": 1' + "0" * 30 + "}", "huge.jsonl cannot be read as a table: "),
    ],
)
def test_a_broken_file_is_named_in_one_sentence(write, name, content, words):
    with pytest.raises(ValueError) as caught:
        read_table(write(name, content))
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert message.endswith(".")
