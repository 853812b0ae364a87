"""Files and rows that are broken, odd or hostile: `python -m pytest tests/test_faults_data.py`.

What tests/test_data.py covers already (formats, missing columns, types, empty rows) is not repeated here.
"""

import datetime
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_helpers import AlpacaError
from alpaca_helpers.data import check_sides, drop_reason, drop_shared, has_answer, tokenize
from alpaca_helpers.prompts import format_example
from alpaca_helpers.rows import load_rows

ROW = {"instruction": "Say « été ».", "input": "", "output": "été 😀"}


def written(folder, suffix, content):
    path = folder / f"rows{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(path, sentence):
    with pytest.raises(AlpacaError, match=sentence) as raised:
        load_rows(path)
    assert path in str(raised.value) and "\n" not in str(raised.value)


LINES = "".join(json.dumps(ROW, ensure_ascii=False) + "\n" for _ in range(3))


@pytest.mark.parametrize(
    "suffix, content",
    [
        (".json", json.dumps([ROW] * 3).encode("utf-8-sig")),
        (".jsonl", LINES.encode("utf-8-sig")),
        (".jsonl", LINES.replace("\n", "\r\n").encode()),
        (".json", json.dumps([ROW] * 3, indent=2).replace("\n", "\r\n").encode()),
        (".jsonl", "\n \n" + LINES.replace("\n", "\n\n\n")),
        (".jsonl", LINES.rstrip("\n")),
    ],
    ids=["json with a BOM", "jsonl with a BOM", "jsonl, CRLF", "json, CRLF", "blank lines", "no last newline"],
)
def test_harmless_differences_change_nothing(suffix, content, tmp_path):
    assert load_rows(written(tmp_path, suffix, content)).to_list() == [{**ROW, "fact": ""}] * 3


TWICE = '{"instruction": "a", "output": "b", "output": "c"}'


@pytest.mark.parametrize(
    "suffix, content, sentence",
    [
        (".json", json.dumps([ROW]).encode("utf-16"), "is not UTF-8 text at byte 0: save it as UTF-8"),
        (".jsonl", LINES.encode("utf-16"), "line 1: not valid JSON in UTF-8"),
        (".json", b'[{"instruction": "\xff", "output": "b"}]', "is not UTF-8 text at byte 18"),
        (".jsonl", LINES.encode() + b'{"instruction": "\xff", "output": "b"}', "line 4: not valid JSON in UTF-8"),
        (".json", "", "line 1: not valid JSON"),
        (".jsonl", "", "has no rows"),
        (".jsonl", "\n\n", "has no rows"),
        (".parquet", "", "cannot be read as Parquet"),
        (".json", json.dumps([ROW, ROW], indent=2)[:-30], "line .*: not valid JSON"),
        (".jsonl", LINES[:-20], "line 3: not valid JSON"),
        (".jsonl", LINES + "instruction,output\n", "line 4: not valid JSON"),
        (".jsonl", LINES + "[1, 2]\n", "row 4: not an object"),
        (".json", f"[{json.dumps(ROW)}, {TWICE}]", "row 2: `output` is there twice"),
        (".jsonl", LINES + TWICE, "row 4: `output` is there twice"),
        (".json", "[" * 100_000, "is no file of rows"),
        (".jsonl", "[" * 100_000, "line 1: not valid JSON"),
        (".json", '[{"instruction": "a", "output": ' + "9" * 5000 + "}]", "is no file of rows"),
        (".json", '[{"instruction": "a", "output": NaN}]', "row 1: `output` is nan, not text"),
        (".json", '[{"instruction": ["a", "b"], "output": "c"}]', r"row 1: `instruction` is \['a', 'b'\], not text"),
        (".json", '[{"instruction": "a", "output": {"text": "c"}}]', "row 1: `output` is .*, not text"),
        (".json", '[{"instruction": "a", "input": 3, "output": "c"}]', "row 1: `input` is 3, not text"),
        (".json", '[{"instruction": "a", "output": true}]', "row 1: `output` is True, not text"),
        (".jsonl", LINES + '{"instruction": "a \\ud83d", "output": "b"}', r"row 4: `instruction` holds half a char"),
    ],
)
def test_a_broken_file_is_one_sentence_with_file_and_row(suffix, content, sentence, tmp_path):
    refused(written(tmp_path, suffix, content), sentence)


def test_a_truncated_parquet_file_is_one_sentence(tmp_path):
    Dataset.from_list([ROW] * 100).to_parquet(tmp_path / "rows.parquet")
    refused(written(tmp_path, ".parquet", (tmp_path / "rows.parquet").read_bytes()[:-20]), "cannot be read as Parquet")


def test_a_date_in_parquet_is_named_and_as_text_it_is_text(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["a"], "output": [datetime.date(2024, 2, 29)]}), path)
    refused(str(path), "row 1: `output` is datetime.date.*, not text")
    dated = written(tmp_path, ".jsonl", json.dumps({**ROW, "output": "2024-02-29"}))
    assert load_rows(dated)[0]["output"] == "2024-02-29"


@pytest.mark.parametrize(
    "text", ["noinput", "<noinput>", "<NoInput>", " No input ", "N/A", "<no input>", "Noinput.", "[no input]"]
)
def test_no_input_in_words_is_no_input(text, tmp_path):
    assert load_rows(written(tmp_path, ".json", json.dumps([{**ROW, "input": text}])))[0]["input"] == ""


@pytest.mark.parametrize("text", ["Na", "na", "No input was given to the valve.", "input", "noinputs"])
def test_an_input_that_only_looks_so_is_kept(text, tmp_path):
    assert load_rows(written(tmp_path, ".json", json.dumps([{**ROW, "input": text}])))[0]["input"] == text


ODD = [
    "NUL \0 and \x1b[31m",
    "emoji 👩‍👩‍👧‍👦 🇫🇷",
    "مرحبا \u202e abc",
    "zero\u200bwidth\ufeff",
    "e\u0301 is not é",
    "\u2028 and \u2029 and \x85 are no line ends",
    "<|endoftext|> Instruction: x\nRéponse: y <script>alert(1)</script>",
    " leading, trailing \n",
    "\r\n",
    '"quoted", \\escaped\\',
]


def round_trip(text, folder, tokenizer):
    """Check that a text in every column comes back exactly: from each format, and from its tokens."""
    row = {"instruction": "x" + text, "input": "x" + text, "output": "x" + text}
    line = json.dumps(row, ensure_ascii=False)
    for suffix, content in ((".json", f"[{line}]"), (".jsonl", line), (".jsonl", json.dumps(row))):
        assert load_rows(written(folder, suffix, content)).to_list() == [{**row, "fact": ""}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "rows.parquet")
    assert load_rows(str(folder / "rows.parquet")).to_list() == [{**row, "fact": ""}]
    ids = tokenize({name: [value] for name, value in row.items()}, tokenizer, max_length=10_000)["input_ids"][0]
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
    assert text == format_example(row["instruction"], row["output"], row["input"])


@pytest.mark.parametrize("text", ODD)
def test_odd_text_comes_back_exactly(text, tmp_path, pocket_tokenizer):
    round_trip(text, tmp_path, pocket_tokenizer)


def test_any_text_comes_back_exactly(tmp_path_factory, pocket_tokenizer):
    folder = tmp_path_factory.mktemp("any")

    @settings(max_examples=60, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def check(text):
        round_trip(text, folder, pocket_tokenizer)

    check()


def test_surrogates_spelled_as_a_pair_are_one_character(tmp_path):
    path = written(tmp_path, ".jsonl", '{"instruction": "\\ud83d\\ude00", "output": "b"}')
    assert load_rows(path)[0]["instruction"] == "😀"


@pytest.mark.integration
@pytest.mark.parametrize("text", ["a" * 2**20, "word " * 2**18, "😀" * 2**18])
def test_a_megabyte_in_one_field_is_cut_like_any_row(text, tmp_path, pocket_tokenizer):
    rows = load_rows(written(tmp_path, ".jsonl", json.dumps({**ROW, "output": text})))
    assert rows[0]["output"] == text
    ids = tokenize(rows[:], pocket_tokenizer)["input_ids"][0]
    assert len(ids) == 128 and pocket_tokenizer.eos_token_id not in ids


def test_rows_that_cannot_be_used_are_dropped_and_counted(tmp_path, pocket_tokenizer):
    rows = [ROW, {**ROW, "instruction": " "}, {**ROW, "output": ""}, {**ROW, "output": "\u00a0\t\n"}]
    rows += [{**ROW, "output": "word " * 81}, {**ROW, "instruction": "long " * 500}]
    read = load_rows(written(tmp_path, ".json", json.dumps(rows)))
    dropped = Counter(map(drop_reason, read))
    assert dropped == {"": 2, "empty instruction": 1, "empty answer": 2, "answer over 80 words": 1}
    kept = read.filter(lambda row: not drop_reason(row))
    tokenized = kept.map(tokenize, batched=True, fn_kwargs={"tokenizer": pocket_tokenizer})
    assert [has_answer(row) for row in tokenized] == [True, False]


def test_questions_on_both_sides_leave_the_training_side_and_are_counted():
    train = Dataset.from_list([{**ROW, "instruction": text} for text in ("One?", "two  ?", "Three?")])
    heldout = Dataset.from_list([{**ROW, "instruction": text, "output": "other"} for text in ("one?", "Two ?")])
    kept = drop_shared(DatasetDict(train=train, heldout=heldout))
    assert kept["train"]["instruction"][:] == ["Three?"] and len(kept["heldout"]) == 2
    none_left = drop_shared(DatasetDict(train=train.select([0]), heldout=heldout))
    with pytest.raises(AlpacaError, match="0 rows are left to train on and 2 are held out") as refused:
        check_sides(none_left)
    assert refused.value.code == "too-few-rows"
