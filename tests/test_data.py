"""A prompt of another form, labels shifted or lost, rows wrongly dropped, held-out rows in training."""

from types import SimpleNamespace
from unittest.mock import Mock

import jinja2
import pytest
import yaml
from datasets import Dataset, DatasetDict
from support import PROJECT, refusal

from alpaca_helpers import data
from alpaca_helpers.data import IGNORED, RECIPES, tokenize
from alpaca_helpers.prompts import encode, format_answer, format_example, format_prompt
from alpaca_helpers.rows import load_rows
from alpaca_helpers.run import Run
from alpaca_lessons import dataset

ROW = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"}


def rows_of(*rows):
    return Dataset.from_list([{"input": "", "fact": "", **row} for row in rows])


def batch_of(*rows):
    return {column: [row.get(column, "") for row in rows] for column in ("instruction", "input", "output")}


def test_prompt_and_example_are_the_documents():
    assert format_prompt("What is the capital of France?") == "Instruction: What is the capital of France?\nRéponse:"
    assert format_prompt("Give the opposite.", "hot") == "Instruction: Give the opposite.\nhot\nRéponse:"
    assert format_example("Hi", "Hello!", "you") == "Instruction: Hi\nyou\nRéponse: Hello!"


@pytest.mark.parametrize("input", ["", "Berlin"])
def test_the_task_of_the_evaluation_harness_asks_as_training_does(input):
    task = yaml.safe_load((PROJECT / "benchmarks" / "lm_eval" / "pocket.yaml").read_text(encoding="utf-8"))
    row = {"instruction": "Name the country.", "input": input, "output": "Germany."}
    asked, wanted = (jinja2.Template(task[key]).render(row) for key in ("doc_to_text", "doc_to_target"))
    assert asked + task["target_delimiter"] + wanted == format_example(row["instruction"], row["output"], input)


def test_known_ids_of_the_documents_prompt_in_gpt2s_vocabulary(gpt2_tokenizer):
    row = {"instruction": "What is the capital of France?", "output": "3"}
    prompt = [6310, 2762, 25, 1867, 318, 262, 3139, 286, 4881, 30, 198, 49, 2634, 79, 2591, 25]
    got = tokenize(batch_of(row), gpt2_tokenizer)
    assert got["input_ids"] == [prompt + [513, 50256]]  # " 3", then the end
    assert got["labels"] == [[IGNORED] * 16 + [513, 50256]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_is_its_features(pocket_tokenizer, recipe):
    """The document's is what its `tokenizer(text, truncation=True, padding="max_length")` gives."""
    features = RECIPES[recipe]
    given = (ROW["instruction"], ROW["input"] if "input" in features else "")
    whole = pocket_tokenizer(format_example(given[0], ROW["output"], given[1])).input_ids
    whole += [pocket_tokenizer.eos_token_id] * ("eos" in features)
    asked = len(pocket_tokenizer(format_prompt(*given)).input_ids) if "answer-loss" in features else 0
    for length in (12, 64):
        got, ids = tokenize(batch_of(ROW), pocket_tokenizer, recipe, length), whole[:length]
        padding = 0 if "dynamic-padding" in features else length - len(ids)
        assert got["input_ids"] == [ids + [pocket_tokenizer.pad_token_id] * padding]
        assert got["labels"] == [([IGNORED] * asked + ids[asked:])[:length] + [IGNORED] * padding]
        masked = "dynamic-padding" not in features
        assert got.get("attention_mask") == ([[1] * len(ids) + [0] * padding] if masked else None)


def test_rows_are_tokenized_as_in_one_piece_and_a_cut_answer_learns_no_end(alpaca_like, pocket_tokenizer):
    rows = load_rows(str(alpaca_like / "alpaca_en_demo.json")).select(range(200))
    got, end = tokenize(rows[:], pocket_tokenizer), pocket_tokenizer.eos_token_id
    for row, ids, labels in zip(rows, got["input_ids"], got["labels"]):
        text = format_example(row["instruction"], row["output"], row["input"])
        whole = pocket_tokenizer(text).input_ids + [end]
        assert ids == whole[:128] and len(labels) == len(ids)
        assert (end in labels) == (len(whole) <= 128)


def test_a_text_longer_than_the_models_positions_is_no_warning(pocket_tokenizer, caplog, capfd):
    (ids,) = encode(["word " * 2000], pocket_tokenizer)
    assert len(ids) > pocket_tokenizer.model_max_length
    assert not caplog.records and capfd.readouterr().err == ""


@pytest.mark.parametrize("text", ["word " * 9_000, "a" * 30_000, "😀" * 20_000])
def test_of_a_very_long_text_only_what_can_be_used_is_tokenized(text, pocket_tokenizer, monkeypatch):
    """A million words would take a minute. A row without room for an answer is noticed."""
    whole = encode([format_prompt(text), format_answer(text)], pocket_tokenizer, False)
    asked = encode([format_prompt("x")], pocket_tokenizer)[0]
    monkeypatch.setattr(data, "encode", Mock(wraps=encode))
    batch = batch_of({"instruction": text, "output": text}, {"instruction": "x", "output": text})
    got = tokenize(batch, pocket_tokenizer, max_length=16)
    seen = [text for call in data.encode.call_args_list for text in call.args[0]]
    assert got["input_ids"] == [whole[0][:16], (asked + whole[1])[:16]] and max(map(len, seen)) == 16_000
    assert [dataset.has_answer({"labels": labels}) for labels in got["labels"]] == [False, True]


@pytest.mark.parametrize(
    "instruction, output, reason",
    [
        ("a", "w " * 80, ""),
        ("b", "w " * 81, "answer over 80 words"),
        (" ", "x", "empty instruction"),
        ("c", " \n\u00a0\t", "empty answer"),
        ("d", "", "empty answer"),
        ("x", "北京是中国的首都。" * 50, "answer over 80 words"),  # 400: a character is a word there
        ("x", "北京是中国的首都。" * 10, ""),
    ],
)
def test_why_a_row_is_not_used(instruction, output, reason):
    assert dataset.drop_reason({"instruction": instruction, "output": output}) == reason


def test_many_rows_lost_for_one_reason_are_noted_with_what_to_do(capsys):
    lost = {"answer over 80 words": 30, "empty answer": 20, "after the first max_train_rows": 90, "answer cut": 21}
    dataset.note_losses(lost, 100)
    notes = capsys.readouterr().out.splitlines()
    for note, reason in zip(
        notes, ("30 of 100 rows are lost or cut (answer over", "21 of 100 rows are lost or cut (ans")
    ):
        assert note.startswith(f"Note: {reason}") and "raise `max_words` or `max_length`" in note
    assert len(notes) == 2


def held_out(train, heldout=None, rows=1, **changes):
    """Return what `hold_out` makes of the rows."""
    chosen = {"max_words": 80, "heldout_rows": rows, "max_train_rows": None, "seed": 0} | changes
    parts = {"train": train} | ({"heldout": heldout} if heldout else {})
    return dataset.hold_out(DatasetDict(parts), SimpleNamespace(**chosen))


def test_split_keeps_a_question_on_one_side_and_is_seeded():
    rows = rows_of(*({"instruction": f"Q{i // 2}" + " " * (i % 2), "output": str(i)} for i in range(40)))
    split, dropped = held_out(rows, rows=3, seed=1)
    train, heldout = split["train"], split["heldout"]
    assert sorted([*train["output"], *heldout["output"]], key=int) == rows["output"][:] and len(heldout) == 6
    assert not {data.question_key(row) for row in train} & {data.question_key(row) for row in heldout} and not dropped
    assert held_out(rows, rows=3, seed=1)[0]["heldout"].to_list() == heldout.to_list()
    assert held_out(rows, rows=3, seed=2)[0]["heldout"].to_list() != heldout.to_list()
    assert len(held_out(rows, rows=1000)[0]["heldout"]) == 8  # a fifth at most
    split, dropped = held_out(rows, rows=3, seed=1, max_train_rows=10)
    assert split["train"]["output"][:] == train["output"][:10] and dropped == {"after the first max_train_rows": 24}


def test_questions_on_both_sides_leave_the_training_side_and_are_counted():
    train = rows_of(*({"instruction": text, "output": "a"} for text in ("One?", "two  ?", "Three?")))
    heldout = rows_of(*({"instruction": text, "output": "b"} for text in ("one?", "Two ?")))
    kept, dropped = held_out(train, heldout)
    assert kept["train"]["instruction"][:] == ["Three?"] and len(kept["heldout"]) == 2
    assert dropped == {"question held out": 2}


def test_a_held_out_question_is_not_learned_by_a_recipe_that_drops_the_input():
    held, other = {"instruction": "Name it.", "output": "a"}, {"instruction": "Q", "output": "a"}
    train = rows_of({**held, "input": "red"}, {**held, "output": "b"}, other)
    kept, dropped = held_out(train, rows_of(held))
    assert kept["train"]["instruction"][:] == ["Q"] and dropped == {"question held out": 2}
    for seed in range(20):  # split off the dataset: the row without input is held out in some, the one with in others
        split, dropped = held_out(train, seed=seed)
        assert len(split["train"]) + len(split["heldout"]) + dropped.total() == 3
        asked = {data.question_key(row) for row in split["heldout"]}
        assert not asked & {data.question_key({**row, "input": ""}) for row in split["train"]}


def test_a_question_is_the_same_however_its_characters_are_spelled():
    pairs = [("Où est l’été ?", "Ou\u0300 est l'e\u0301te\u0301 ?"), ("Say “hi” 1,000 times", 'say "HI" 1000  times')]
    pairs += [("A well\u2011known\u200b co\u00adlour", "\ufeffa well-known colour")]
    rows = rows_of(*({"instruction": text, "output": "a"} for pair in pairs for text in pair))
    assert len(set(map(data.question_key, rows))) == 3
    split, _ = held_out(rows)
    assert len(split["train"]) == 4 and len(split["heldout"]) == 2
    assert len(held_out(rows.select([0, 2]), rows.select([1]))[0]["train"]) == 1
    different = ["Add 1,2 and 3", "Add 12 and 3", "Add 1,23", "Add 123", "Add 0,125", "Add 0125"]
    different += ["Is it “hi”?", "Is it hi?"]
    assert len({data.question_key({"instruction": text, "input": ""}) for text in different}) == len(different)


def test_the_manifest_has_paths_of_this_machine_only_outside_the_checkout(tmp_path):
    settings = SimpleNamespace(name="n", model=str(PROJECT / "m" / "x"), dataset=str(tmp_path / "r.json"), heldout=None)
    with dataset.save_data(tmp_path, settings, DatasetDict(train=rows_of(ROW), heldout=rows_of(ROW))):
        pass
    record = Run(tmp_path).manifest()["data"]
    assert [record[name] for name in ("name", "model", "dataset", "heldout")] == ["n", "m/x", settings.dataset, None]


def test_data_that_are_cut_before_their_record_have_none_rather_than_that_of_other_rows(tmp_path, monkeypatch):
    names = ("name", "model", "dataset", "max_length", "seed", "learning_rate", "num_train_epochs")
    settings = SimpleNamespace(**dict.fromkeys(names[:3], "a"), **dict.fromkeys(names[3:], 1), recipe="answers")
    split, write = DatasetDict(train=rows_of(ROW), heldout=rows_of(ROW)), Run.write_record

    def save():
        with dataset.save_data(tmp_path, settings, split) as part:
            (part / "rows").touch()

    save()
    monkeypatch.setattr(Run, "write_record", lambda *given: write(*given) if given[2] == {} else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save()
    assert "run notebook 02_dataset_and_tokenizer" in refusal(Run(tmp_path).record, "data")


def test_too_few_questions_to_train_on_or_to_hold_out_are_a_sentence():
    one, none = rows_of(ROW, ROW), rows_of(ROW).select([])
    for check, rows, train, heldout in (
        (held_out, one, 0, 2),
        (held_out, none, 0, 0),
        (dataset.check_sides, DatasetDict(train=none, heldout=one), 0, 2),
        (dataset.check_sides, DatasetDict(train=one, heldout=none), 2, 0),
    ):
        assert f"{train} rows are left to train on and {heldout} are held out" in refusal(check, rows)


def test_fingerprint_is_of_the_text():
    def of(train, heldout):
        return dataset.fingerprint(DatasetDict(train=train, heldout=heldout))

    one, none = rows_of(ROW), rows_of(ROW).select([])
    assert of(one, one) == of(Dataset.from_list(one.to_list()), one)
    assert of(one, one) != of(rows_of({**ROW, "output": "4"}), one)
    assert of(one, one) != of(rows_of(ROW, ROW), none)
