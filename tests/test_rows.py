"""Files of rows in every form, broken, odd or hostile: read exactly, or one sentence with file and row."""

import csv
import datetime
import gzip
import io
import json
import os
import re
import shutil
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support import refusal

from alpaca_helpers import AlpacaError
from alpaca_helpers.data import tokenize
from alpaca_helpers.prompts import format_example
from alpaca_helpers.rows import load_rows
from alpaca_lessons.dataset import prepare_rows

ROW = {"instruction": 'Say, "été"', "input": "", "output": "été\n\u2028😀"}
LINES = "".join(json.dumps(ROW, ensure_ascii=False) + "\n" for _ in range(2))
ARRAY = json.dumps([ROW] * 2, indent=2, ensure_ascii=False)


def table(rows, suffix) -> bytes:
    written = pyarrow.BufferOutputStream()
    {".csv": Dataset.to_csv, ".parquet": Dataset.to_parquet}[suffix](Dataset.from_list(rows), written)
    return written.getvalue().to_pybytes()


def lines(delimiter=",", end="\n", after=(), rows=(ROW, ROW)) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([[*ROW], *([*row.values(), *after] for row in rows)])
    return text.getvalue()


def written(folder, suffix, content) -> str:
    path = folder / f"rows{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    "suffix, content",
    [
        (".json", ARRAY),
        (".json", ARRAY.encode("utf-8-sig")),
        (".json", ARRAY.replace("\n", "\r\n")),
        (".json", LINES),
        (".json", LINES.encode("utf-8-sig")),
        (".JSON", ARRAY),
        (".json.gz", gzip.compress(ARRAY.encode(), mtime=0)),
        (".jsonl", LINES),
        (".jsonl", LINES.encode("utf-8-sig")),
        (".jsonl", "\n \n" + LINES.replace("\n", "\r\n\n")),
        (".jsonl", LINES.rstrip("\n")),
        (".jsonl", LINES.replace('", "', '",\n"')),  # a row on several lines
        (".jsonl", LINES[: len(LINES) // 2].encode("utf-8-sig") * 2),  # two files put together
        (".jsonl", ARRAY),
        (".jsonl", json.dumps([ROW] * 2)),
        (".jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        (".csv", table([ROW] * 2, ".csv")),
        (".CSV.GZ", gzip.compress(table([ROW] * 2, ".csv"), mtime=0)),
        (".csv", lines(after=[""])),
        (".csv", lines().replace("output\n", "output,\n\n")),
        (".csv", lines(end="\r").encode("utf-8-sig")),
        (".csv", lines(";")),
        (".csv", lines("\t")),
        (".tsv", lines("\t", end="\r\n")),
        (".parquet", table([ROW] * 2, ".parquet")),
        (".parquet.gz", gzip.compress(table([ROW] * 2, ".parquet"), mtime=0)),
    ],
)
def test_the_same_rows_from_every_form(suffix, content, tmp_path):
    assert load_rows(written(tmp_path, suffix, content)).to_list() == [{**ROW, "fact": ""}] * 2


def test_rows_of_shards_are_read_in_their_order(tmp_path):
    """Also from a folder that is named like a file, as Spark writes it."""
    folder = tmp_path / "rows.parquet"
    folder.mkdir()
    for number, ending in enumerate(("parquet", "PARQUET")):
        (folder / f"part-{number}.{ending}").write_bytes(table([{**ROW, "fact": str(number)}], ".parquet"))
    (folder / "_SUCCESS").touch()
    assert load_rows(str(folder))["fact"][:] == ["0", "1"]


@pytest.mark.parametrize(
    "content",
    [
        'instruction,output\n"Q, q", "A"\n',  # a space before the quotes
        '"instruction", "output"\r\n"Q, q", "A"\r\n',
        'sep=;\ninstruction;output\n"Q, q"; "A"\n',  # Excel's first line
        ',instruction,output\n0,"Q, q",A\n',  # the index that pandas writes
        'Unnamed: 0,instruction,output\n0,"Q, q",A\n',
    ],
)
def test_csv_as_it_is_found_is_read(content, tmp_path, capsys):
    wanted = {"instruction": "Q, q", "input": "", "output": "A", "fact": ""}
    assert load_rows(written(tmp_path, ".csv", content)).to_list() == [wanted]
    assert not capsys.readouterr().out


def test_spaces_at_the_ends_of_a_field_are_its_own(tmp_path):
    content = 'instruction,output\n" a, ""b"",\n ""c, """, d\n'
    (row,) = load_rows(written(tmp_path, ".csv", content))
    assert (row["instruction"], row["output"]) == (' a, "b",\n "c, "', " d")


def test_rows_for_which_the_disk_has_no_room_are_refused_before_they_are_written(tmp_path, monkeypatch):
    source = written(tmp_path, ".json", json.dumps([{**ROW, "output": "a" * 200_000}]))  # which Parquet makes small
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    with pytest.raises(AlpacaError, match="rows/train.parquet cannot be written .No space left on device; "):
        prepare_rows(tmp_path, source)
    assert not (tmp_path / "rows").exists()


def test_prepared_rows_are_what_load_dataset_reads(tmp_path):
    """Also a column that is empty or looks like dates stays text."""
    mine = [{**ROW, "input": "1"}, {**ROW, "fact": "3"}]
    for name, rows in {"mine": mine, "held": [{"instruction": "When?", "output": "2001-01-01"}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = prepare_rows(tmp_path, str(tmp_path / "mine.json"), None, str(tmp_path / "held.json"))
    dataset = load_dataset("parquet", data_files=files, cache_dir=tmp_path / "cache")
    assert dataset["train"].to_list() == [{**ROW, "input": "1", "fact": ""}, {**ROW, "fact": "3"}]
    assert dataset["heldout"].to_list() == [{"instruction": "When?", "input": "", "output": "2001-01-01", "fact": ""}]
    assert list(prepare_rows(tmp_path, str(tmp_path / "mine.json"))) == ["train"]


def test_the_same_rows_are_written_once_so_that_the_cache_holds_one_copy(tmp_path):
    source, times = tmp_path / "rows.json", []
    for rows in ([ROW], [ROW], [ROW, ROW]):
        source.write_text(json.dumps(rows))
        path = prepare_rows(tmp_path, str(source))["train"]
        times.append(os.stat(path).st_mtime_ns)
        assert pyarrow.parquet.read_table(path).num_rows == len(rows)
    assert times[0] == times[1] < times[2]


def test_rows_of_somebody_in_their_place_stay(tmp_path):
    mine = tmp_path / "rows" / "train.parquet"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(AlpacaError, match="train.parquet is in the way"):
        prepare_rows(tmp_path, written(tmp_path, ".json", ARRAY))
    assert mine.read_text() == "mine"


def test_no_input_in_words_is_no_input_and_a_question_in_the_input_alone_is_the_question(tmp_path):
    nothing = ["noinput", "<noinput>", "<NoInput>", " No input ", "N/A", "<no input>", "Noinput.", "[no input]"]
    kept = ["Na", "na", "No input was given to the valve.", "input", "noinputs"]
    rows = [{**ROW, "input": text} for text in nothing + kept] + [{**ROW, "instruction": " ", "input": "Who?"}]
    *read, last = load_rows(written(tmp_path, ".json", json.dumps(rows)))
    assert [row["input"] for row in read] == [""] * len(nothing) + kept
    assert last == {**ROW, "instruction": "Who?", "fact": ""}


def test_other_columns_that_hold_text_are_named_once(tmp_path, capsys):
    rows = [{**ROW, "history": held, "system": "Be kind.", "empty": "", "text": "all"} for held in ([], ["a"], ["b"])]
    load_rows(written(tmp_path, ".json", json.dumps(rows)))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Note: ") and line.endswith("`system`, `history`.")


ODD = [
    "NUL \0, \x1b[31m, 👩‍👩‍👧‍👦 🇫🇷, مرحبا \u202e abc, zero\u200bwidth\ufeff, e\u0301 is not é",
    "\u2028 and \u2029 and \x85 are no line ends",
    "<|endoftext|> Instruction: x\nRéponse: y <script>alert(1)</script>",
    ' leading, "quoted", \\escaped\\, trailing \n',
    "\r\n",
]


def test_any_text_comes_back_exactly_from_each_format_and_from_its_tokens(tmp_path, pocket_tokenizer):
    @settings(max_examples=60, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def check(text):
        row = {"instruction": "x" + text, "input": "x" + text, "output": "x" + text}
        line = json.dumps(row, ensure_ascii=False)
        for suffix, content in ((".json", f"[{line}]"), (".jsonl", line), (".jsonl", json.dumps(row))):
            assert load_rows(written(tmp_path, suffix, content)).to_list() == [{**row, "fact": ""}]
        assert load_rows(written(tmp_path, ".csv", lines(rows=[row]))).to_list() == [{**row, "fact": ""}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
        assert load_rows(str(tmp_path / "rows.parquet")).to_list() == [{**row, "fact": ""}]
        batch = {name: [value] for name, value in row.items()}
        (ids,) = tokenize(batch, pocket_tokenizer, max_length=10_000)["input_ids"]
        assert ids.count(pocket_tokenizer.eos_token_id) == 1 and ids[-1] == pocket_tokenizer.eos_token_id
        decoded = pocket_tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
        assert decoded == format_example(row["instruction"], row["output"], row["input"])

    for text in ODD:
        check.hypothesis.inner_test(text)
    check()


@pytest.mark.integration
def test_a_megabyte_in_one_field_is_cut_like_any_row(tmp_path, pocket_tokenizer):
    texts = ["a" * 2**20, "word " * 2**18, "😀" * 2**18]
    rows = load_rows(written(tmp_path, ".json", json.dumps([{**ROW, "output": text} for text in texts])))
    assert rows["output"][:] == texts
    for ids in tokenize(rows[:], pocket_tokenizer)["input_ids"]:
        assert len(ids) == 128 and pocket_tokenizer.eos_token_id not in ids


OK = '{"instruction": "a", "output": "b"}'
TWICE = '{"instruction": "a", "output": "b", "output": "c"}'
DATED = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.table({"instruction": ["a"], "output": [datetime.date(2024, 2, 29)]}), DATED)
FAR = pyarrow.BufferOutputStream()  # a date that Python has not
LATE = pyarrow.array([2**62], pyarrow.timestamp("us"))
pyarrow.parquet.write_table(pyarrow.table({"instruction": ["a"], "output": ["b"], "when": LATE}), FAR)
DOUBLE = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], ["instruction", "output", "output"]), DOUBLE)
HALF = '"\\ud83d": "b"'
INVALID = b'{"instruction": "\xff", "output": "b"}'


@pytest.mark.parametrize(
    "suffix, content, place",
    [
        # not text, or cut
        (".json", ARRAY.encode("utf-16"), "'utf-8' .* position 0"),
        (".jsonl", LINES.encode() + INVALID, f"'utf-8' .* position {len(LINES.encode()) + 17}"),
        (".csv", "instruction,output\né,b\n".encode("latin-1"), "'utf-8' .* position 19"),
        (".json.gz", gzip.compress(b"[1]" * 999, mtime=0)[:-20], "cannot be read"),
        (".parquet", table([ROW] * 100, ".parquet")[:-20], "Parquet"),
        (".json", ARRAY[:-10], "line 10"),
        (".jsonl", LINES[:-20], "line 2"),
        (".json", '{"instruction": "a", "output": "b"}\n{"instr', "line 2"),
        (".json", '[{"instruction": "a",\n "output": }]', "line 2"),
        (".jsonl", LINES + "instruction,output\n", "line 3"),
        (".json", "[" * 100_000, "recursion"),
        (".json", '[{"instruction": "a", "output": ' + "9" * 5000 + "}]", "5000 digits"),
        # CSV with other fields than names, or with quotes that do not pair
        (".csv", "instruction,output\nQ,A\nName red, blue or green.,Red.\n", "line 3: 3 fields under 2 names"),
        (".csv", "instruction,output\nQ,A,,B\n", "line 2: 4 fields under 2 names"),
        (".csv", 'instruction,output\n"Q\n",A\nQ\n', "line 4: 1 fields under 2 names"),
        (".csv", 'instruction,output\n"Say \\"a\\" b",A\n', "line 2: ',' expected"),
        (".csv", 'instruction,output\nQ,A\n"Q,A\nQ,A\n', "line 3: unexpected end"),
        # empty
        (".json", "", "no rows"),
        (".json", "[]", "no rows"),
        (".jsonl", "\n\n", "no rows"),
        (".parquet", "", "Parquet"),
        (".csv", "", "no rows"),
        (".csv", "instruction,output\n\n", "no rows"),
        # no rows, or without a column
        (".xlsx", "x", "is neither a file"),
        (".json", "{}", "row 1: `instruction` is None, not text; its columns are none"),
        (".csv", "instruction|output\na|b\n", r"row 1: `instruction` is None.* columns are instruction\|output"),
        (".json", '["a"]', "row 1: not an object"),
        (".jsonl", LINES + "[1, 2]\n", "row 3: not an object"),
        (
            ".json",
            f'[{OK}, {{"instruction": "a"}}]',
            "row 2: `output` is None, not text; its columns are instruction",
        ),
        (".json", f"[{json.dumps(ROW)}, {TWICE}]", "row 2: not an object whose names"),
        (".jsonl", LINES + TWICE, "row 3: not an object whose names"),
        (".csv", "instruction,output,output\na,b,c\n", "row 1: not an object whose names"),
        (".parquet", DOUBLE.getvalue().to_pybytes(), "row 1: not an object whose names"),
        # columns that hold no text
        (".json", '[{"instruction": "a", "output": 3}]', "row 1: `output` is 3"),
        (".json", '[{"instruction": null, "output": "b"}]', "row 1: `instruction` is None"),
        (".json", '[{"instruction": "a", "output": NaN}]', "row 1: `output` is nan"),
        (".json", '[{"instruction": ["a", "b"], "output": "c"}]', r"row 1: `instruction` is \['a', 'b'\]"),
        (".json", '[{"instruction": "a", "input": {"b": 3}, "output": "c"}]', r"row 1: `input` is \{'b': 3\}"),
        (".json", '[{"instruction": "a", "output": true}]', "row 1: `output` is True"),
        (".jsonl", LINES + '{"instruction": "a \\ud83d", "output": "b"}', "row 3: it holds half a char"),
        (".jsonl", LINES + OK[:-1] + f", {HALF}}}", "row 3: it holds half a char"),
        (".json", f"[{{{HALF}, {HALF}}}]", "row 1: not an object whose names"),
        (".parquet", FAR.getvalue().to_pybytes(), "out of range"),
        (".csv", f'"A long Q?\nYes","{"An answer. " * 99}"\na,b\n', "columns are A long Q. Yes, An answer"),
        (".parquet", DATED.getvalue().to_pybytes(), "row 1: `output` is datetime.date"),
        # other names of columns
        (".json", '[{"instruction": "a", "response": "b"}]', "`output` is None.* columns are instruction, response; "),
        (".json", '[{"messages": [{"content": "a"}]}]', "columns are messages; .*texts `instruction` and `output`"),
    ],
)
def test_a_broken_file_is_one_sentence_with_file_and_row_and_names_the_mapping(suffix, content, place, tmp_path):
    path = written(tmp_path, suffix, content)
    said = refusal(load_rows, path)
    assert re.search(place, said) and path in said and len(said) < len(path) + 500
    assert said.encode()  # half a character cannot be printed


def test_what_is_no_name_on_the_hub_is_never_looked_up_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("alpaca_helpers.rows._hub_rows", lambda *given: pytest.fail("looked up"))
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to("name")  # to itself
    (tmp_path / "rows.json").mkdir()
    endings = [f"here/rows.{ending}" for ending in ("json", "tsv", "TXT", "xlsx", "parquet.gz", "jsonl.zst")]
    for name in (*endings, "./owner/name", "owner/name", "rows.json", "~nobody-here/x", "~nobody-here/x.csv", "a\0b"):
        said = refusal(load_rows, name)
        assert "is neither a file here" in said and name in said
    for name in ("x" * 300 + ".json", "é" * 200, "owner/" + "x" * 300):
        assert "is too long for a file's name" in refusal(load_rows, name)
