import gzip
import json

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from alpaca_helpers import AlpacaError
from alpaca_helpers.data import (
    IGNORED,
    RECIPES,
    drop_reason,
    fingerprint,
    has_answer,
    note_losses,
    question_key,
    split_rows,
    tokenize,
)
from alpaca_helpers.prompts import format_example, format_prompt
from alpaca_helpers.rows import load_rows, prepare_rows

ROW = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"}


def rows_of(*rows):
    return Dataset.from_list([{"input": "", "fact": "", **row} for row in rows])


def batch_of(*rows):
    return {column: [row.get(column, "") for row in rows] for column in ("instruction", "input", "output")}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_the_same_rows_from_every_format(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    rows = [ROW, {"instruction": "Dis « été »", "input": "<noinput>", "output": "été 😀", "text": "ignored"}]
    if suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8-sig")
    elif suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        Dataset.from_list([{"text": "", **row} for row in rows]).to_parquet(path)
    loaded = load_rows(str(path))
    assert loaded.column_names == ["instruction", "input", "output", "fact"]
    assert loaded[0] == {**ROW, "fact": ""}
    assert loaded[1] == {"instruction": "Dis « été »", "input": "", "output": "été 😀", "fact": ""}


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "no rows"),
        ("{}", "no JSON array"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "row 2: no column `output`"),
        ('[{"question": "a", "answer": "b"}]', "row 1: no column `instruction`, it has question, answer: rename"),
        ('[{"instruction": "a", "output": 3}]', "row 1: `output` is 3, not text"),
        ('[{"instruction": null, "output": "b"}]', "row 1: `instruction` is None, not text"),
        ('["a"]', "row 1: not an object"),
        ('[{"instruction": "a",\n "output": }]', "line 2: not valid JSON"),
    ],
)
def test_a_bad_file_is_one_sentence_with_file_and_row(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(AlpacaError, match=message) as error:
        load_rows(str(path))
    assert "rows.json" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_never_looked_up_on_the_hub():
    with pytest.raises(AlpacaError, match="no dataset file here/rows.json"):
        load_rows("here/rows.json")
    with pytest.raises(AlpacaError, match="neither"):
        load_rows("./owner/name")


@pytest.mark.parametrize(
    "instruction, output, reason",
    [
        ("a", "w " * 80, ""),
        ("b", "w " * 81, "answer over 80 words"),
        (" ", "x", "empty instruction"),
        ("c", " \n", "empty answer"),
        ("x", "北京是中国的首都。" * 50, "answer over 80 words"),  # 400: a character is a word there
        ("x", "北京是中国的首都。" * 10, ""),
    ],
)
def test_why_a_row_is_not_used(instruction, output, reason):
    assert drop_reason({"instruction": instruction, "output": output}) == reason


def test_prepared_rows_are_what_load_dataset_reads(tmp_path):
    for name, rows in {"mine": [ROW, {**ROW, "fact": "3"}], "held": [{**ROW, "input": ""}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = prepare_rows(tmp_path / "rows", str(tmp_path / "mine.json"), None, str(tmp_path / "held.json"))
    dataset = load_dataset("parquet", data_files=files)
    assert dataset["train"].to_list() == [{**ROW, "fact": ""}, {**ROW, "fact": "3"}]
    assert dataset["heldout"].to_list() == [{**ROW, "input": "", "fact": ""}]
    assert list(prepare_rows(tmp_path / "rows", str(tmp_path / "mine.json"))) == ["train"]


def test_rows_are_read_in_many_forms(tmp_path):
    rows = [ROW, {"instruction": 'Say, "été"', "input": "", "output": "été\n\u2028😀"}]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    table = Dataset.from_list(rows)
    (tmp_path / "lines.json").write_bytes(lines)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    table.to_csv(tmp_path / "table.csv")
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress((tmp_path / "table.csv").read_bytes()))
    (tmp_path / "shards").mkdir()
    for number in range(2):
        table.select([number]).to_parquet(tmp_path / "shards" / f"part-{number}.parquet")
    for name in ("lines.json", "lines.jsonl.gz", "array.json.gz", "table.csv", "table.csv.gz", "shards"):
        read = load_rows(str(tmp_path / name)).remove_columns("fact").to_list()
        assert read == rows, name


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("cut.json.gz", gzip.compress(b"[1]" * 999, mtime=0)[:-20], "cannot be read"),
        ("cut.csv", b'instruction,output\n"a,b\n', "cannot be read as CSV"),
        ("latin.csv", "instruction,output\né,b\n".encode("latin-1"), "cannot be read as CSV"),
        ("empty.csv", b"", "cannot be read as CSV"),
        ("two.json", b'{"instruction": "a", "output": "b"}\n{"instr', "line 2"),
        ("table.xlsx", b"x", "is neither a file .*csv.*folder of .parquet"),
    ],
)
def test_other_forms_and_broken_ones_are_a_sentence(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AlpacaError, match=said) as raised:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"instruction": "a", "response": "b"}, "rename `response` to `output`"),
        ({"question": "a", "answer": "b"}, "rename `question` to `instruction`, `answer` to `output`"),
        ({"messages": [{"role": "user", "content": "a"}]}, "each question of `messages` as `instruction`"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "of `conversations` as `instruction`.*as `output`"),
        ({"x": "a"}, "rename the columns to instruction, input, output"),
    ],
)
def test_a_sentence_names_the_mapping(row, said, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(AlpacaError, match=said):
        load_rows(str(tmp_path / "rows.json"))


def test_other_columns_that_hold_text_are_named_once(tmp_path, capsys):
    rows = [{**ROW, "history": history, "system": "Be kind.", "empty": ""} for history in ([], ["a"], ["b"])]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    load_rows(str(tmp_path / "rows.json"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Note: ") and line.endswith("not used: `system` (3 rows), `history` (2 rows).")


def test_a_question_in_the_input_alone_is_the_question(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": " ", "input": "Who?", "output": "Me."}]))
    (row,) = load_rows(str(tmp_path / "rows.json"))
    assert (row["instruction"], row["input"]) == ("Who?", "") and not drop_reason(row)


def test_many_rows_lost_for_one_reason_are_noted_with_what_to_do(capsys):
    lost = {"answer over 80 words": 30, "empty answer": 20, "after the first max_train_rows": 90, "answer cut": 21}
    note_losses(lost, 100)
    assert capsys.readouterr().out.splitlines() == [
        "Note: 30 of 100 rows, answer over 80 words: raise `max_words` to use them.",
        "Note: 21 of 100 rows, answer cut: raise `max_length`, or they teach no end.",
    ]


def test_a_column_that_is_empty_or_looks_like_dates_stays_text(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"instruction": "When?", "output": "2001-01-01"}))
    dataset = load_dataset("parquet", data_files=prepare_rows(tmp_path, str(tmp_path / "mine.jsonl")))
    assert dataset["train"][0] == {"instruction": "When?", "input": "", "output": "2001-01-01", "fact": ""}


def test_split_keeps_a_question_on_one_side_and_is_seeded():
    rows = rows_of(*({"instruction": f"Q{i // 2}" + " " * (i % 2), "output": str(i)} for i in range(40)))
    train, heldout = (split_rows(rows, 3, seed=1)[side] for side in ("train", "heldout"))
    assert (len(train), len(heldout)) == (34, 6)
    assert not {question_key(row) for row in train} & {question_key(row) for row in heldout}
    assert split_rows(rows, 3, seed=1)["heldout"].to_list() == heldout.to_list()
    assert split_rows(rows, 3, seed=2)["heldout"].to_list() != heldout.to_list()
    assert len(split_rows(rows, 1000)["heldout"]) == 8  # a fifth at most


@pytest.mark.parametrize("rows, said", [([ROW, ROW], "one question only"), ([], "no row that the filters keep")])
def test_too_few_questions_to_hold_any_out(rows, said):
    with pytest.raises(AlpacaError, match=said) as raised:
        split_rows(rows_of(ROW).select([0] * len(rows)), 3)
    assert raised.value.code == "too-few-rows"


def test_fingerprint_is_of_the_text():
    def of(train, heldout):
        return fingerprint(DatasetDict(train=train, heldout=heldout))

    one, none = rows_of(ROW), rows_of(ROW).select([])
    assert of(one, one) == of(Dataset.from_list(one.to_list()), one)
    assert of(one, one) != of(rows_of({**ROW, "output": "4"}), one)
    assert of(one, one) != of(rows_of(ROW, ROW), none)


def test_tokenize_document_is_the_documents(gpt2_tokenizer):
    got = tokenize(batch_of(ROW), gpt2_tokenizer, "document", 32)
    text = format_example(ROW["instruction"], ROW["output"])  # the input is dropped
    expected = gpt2_tokenizer(text, truncation=True, max_length=32, padding="max_length")
    assert got["input_ids"] == [expected["input_ids"]]
    assert got["attention_mask"] == [expected["attention_mask"]]
    length = sum(expected["attention_mask"])
    assert got["labels"] == [expected["input_ids"][:length] + [IGNORED] * (32 - length)]


def test_tokenize_answers_learns_the_answer_and_its_end(gpt2_tokenizer):
    got = tokenize(batch_of(ROW), gpt2_tokenizer)
    prompt = gpt2_tokenizer(format_prompt(ROW["instruction"], ROW["input"])).input_ids
    assert got["input_ids"] == [prompt + [513, 50256]]  # " 3", then the end
    assert got["labels"] == [[IGNORED] * len(prompt) + [513, 50256]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_is_its_features(gpt2_tokenizer, recipe):
    got = tokenize(batch_of(ROW), gpt2_tokenizer, recipe, 64)
    text = gpt2_tokenizer.decode([i for i, label in zip(got["input_ids"][0], got["labels"][0]) if label != IGNORED])
    assert ("<|endoftext|>" in text) == ("eos" in RECIPES[recipe])
    assert ("Instruction" not in text) == ("answer-loss" in RECIPES[recipe])
    assert ("1 and 2" in gpt2_tokenizer.decode(got["input_ids"][0])) == ("input" in RECIPES[recipe])
    assert (len(got["input_ids"][0]) < 64) == ("attention_mask" not in got) == ("dynamic-padding" in RECIPES[recipe])


def test_known_ids_of_the_documents_prompt(gpt2_tokenizer):
    row = {"instruction": "What is the capital of France?", "output": "Paris"}
    ids = tokenize(batch_of(row), gpt2_tokenizer)["input_ids"][0]
    assert ids[:16] == [6310, 2762, 25, 1867, 318, 262, 3139, 286, 4881, 30, 198, 49, 2634, 79, 2591, 25]


def test_real_rows_with_the_real_tokenizer(real_data, gpt2_tokenizer):
    rows = load_rows(str(real_data / "alpaca_en_demo.json")).filter(lambda row: not drop_reason(row))
    got = tokenize(rows[:], gpt2_tokenizer)
    for row, ids, labels in zip(rows, got["input_ids"], got["labels"]):
        text = format_example(row["instruction"], row["output"], row["input"])
        whole = gpt2_tokenizer(text).input_ids + [50256]  # tokenized in one piece, the ids are the same
        assert ids == whole[:128] and len(labels) == len(ids)
        assert (50256 in labels) == (len(whole) <= 128)  # a cut answer does not learn to end there


def test_markers_in_a_row_stay_text(gpt2_tokenizer):
    row = {"instruction": "Say <|endoftext|>", "output": "<|endoftext|> it is"}
    ids = tokenize(batch_of(row), gpt2_tokenizer)["input_ids"][0]
    assert ids.count(50256) == 1 and ids[-1] == 50256


def test_a_row_without_room_for_an_answer_is_noticed(pocket_tokenizer):
    got = tokenize(batch_of({"instruction": "x " * 300, "output": "y"}, ROW), pocket_tokenizer)
    assert [has_answer({"labels": labels}) for labels in got["labels"]] == [False, True]


def test_unknown_recipe(pocket_tokenizer):
    with pytest.raises(AlpacaError, match="no recipe 'x': choose document"):
        tokenize(batch_of(ROW), pocket_tokenizer, "x")
