"""The pocket is what it claims to be: true facts, honest splits, a model that knows and has not been taught to answer.

Run with: python -m pytest tests/test_pocket.py
"""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections import defaultdict

import pytest
import torch
from support import PROJECT
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca_helpers.generation import generate
from alpaca_helpers.lora import load_adapter
from alpaca_helpers.metrics import contains
from alpaca_helpers.pocket import DOCUMENT, FOLDER, HELDOUT, MODEL, TRAIN
from alpaca_helpers.prompts import format_example, format_prompt
from alpaca_helpers.rows import load_rows
from alpaca_helpers.runs import artifact, read_record
from pocket import build, corpus

TEXT_HASH = """
import hashlib
from pocket import corpus
print(hashlib.sha256(repr((corpus.documents(), corpus.instruction_rows())).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def facts():
    return corpus.read_facts()


@pytest.fixture(scope="module")
def texts():
    return corpus.documents()


@pytest.fixture(scope="module")
def rows():
    """Return the generated training and held-out rows."""
    return corpus.instruction_rows()


@pytest.fixture(scope="module")
def heldout_facts(facts):
    heldout = corpus.choose_heldout(facts)
    return [fact for fact in facts if (fact.kind.table, fact.entity) in heldout]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# The facts


@pytest.mark.parametrize("path", sorted(corpus.FACTS.glob("*.csv")), ids=lambda path: path.stem)
def test_a_table_says_nothing_twice(path):
    with path.open(encoding="utf-8", newline="") as lines:
        table = list(csv.DictReader(lines))
    subjects = [next(iter(row.values())) for row in table]
    assert len(set(subjects)) == len(subjects)
    assert all(cell is not None and cell == cell.strip() for row in table for cell in row.values())


def test_a_word_has_one_opposite():
    words = [row["word"] for row in corpus.read_tables()["opposites"]]
    assert len(set(words)) == len(words)


def test_sixty_countries_are_complete():
    complete = [row for row in corpus.read_tables()["countries"] if all(row.values())]
    assert len(complete) >= 60


@pytest.mark.parametrize(
    "name, subject, value",
    [
        ("capital", "France", "Paris"),
        ("language", "Brazil", "Portuguese"),
        ("creator", "Hamlet", "William Shakespeare"),
        ("opposite", "cold", "hot"),
        ("arithmetic", "the square of 7", "49"),
    ],
)
def test_known_facts(facts, name, subject, value):
    stated = [fact for fact in facts if fact.kind.name == name and subject in fact.cells.values()]
    assert value in {fact.value for fact in stated}


def test_lists_name_different_things():
    for row in corpus.read_tables()["lists"]:
        items = re.split(", | and ", row["items"])
        assert len(items) == len(set(items)) == {word: n for n, word in corpus.COUNTS.items()}[row["count"]]


# The rows


def test_the_shipped_rows_are_the_generated_ones(rows):
    assert (read_rows(TRAIN), read_rows(HELDOUT)) == rows


def test_rows_are_in_alpacas_columns(rows):
    for row in rows[0] + rows[1]:
        assert list(row) == ["instruction", "input", "output", "text", "fact"]
        assert row["text"] == format_example(row["instruction"], row["output"], row["input"])


def test_the_check_of_a_fact_is_never_vacuous(rows):
    for row in rows[0] + rows[1]:
        if row["fact"]:
            assert row["fact"] in row["output"]
            assert row["fact"].casefold() not in format_prompt(row["instruction"], row["input"]).casefold()


def test_there_are_enough_rows_of_each_sort(rows):
    train, heldout = rows
    assert sum(row["fact"] != "" for row in heldout) >= 200
    assert sum(row["input"] != "" for row in train) >= 20
    assert sum(len(row["output"].split()) > 80 for row in train) >= 5
    assert max(len(row["output"].split()) for row in heldout) <= 80


def test_what_the_lessons_ask_is_held_out(rows):
    train, heldout = rows
    assert set(corpus.QUESTIONS) <= {row["instruction"] for row in heldout}
    assert not set(corpus.QUESTIONS) & {row["instruction"] for row in train}


def test_some_requests_need_their_input(rows):
    """The same instruction has other answers with another input: dropping the input leaves it unanswerable."""
    answers = defaultdict(set)
    for row in rows[0]:
        if row["input"]:
            answers[row["instruction"]].add(row["output"])
    assert max(map(len, answers.values())) > 1


# Honesty


def lines_of(text):
    """Return a document's lines without the dash or the label before each."""
    marks = ("- ", *corpus.LABELS)
    return [
        next((line.removeprefix(mark) for mark in marks if line.startswith(mark)), line) for line in text.split("\n")
    ]


@pytest.mark.integration
def test_heldout_entities_are_stated_in_pretraining(heldout_facts, texts):
    stated = {"\n".join(lines_of(text)) for text in texts}
    sentences = {line for text in stated for line in text.split("\n")} | stated
    assert [fact.answer for fact in heldout_facts if fact.answer not in sentences] == []


def test_heldout_entities_are_in_no_training_row(heldout_facts, rows):
    train = "\n".join(row["text"] for row in rows[0])
    names = {name for fact in heldout_facts for name in corpus.names(fact)}
    assert [name for name in names if corpus.mentions(train, name)] == []


def test_heldout_rows_ask_for_heldout_entities(heldout_facts, rows):
    assert {row["output"] for row in rows[1]} <= {fact.answer for fact in heldout_facts}


@pytest.mark.integration
def test_pretraining_never_shows_the_prompt(texts):
    for text in texts:
        assert not re.search("instruction|réponse|response|answer:|question:", text, re.IGNORECASE)


@pytest.mark.integration
def test_no_question_is_followed_by_its_answer(facts, texts):
    """A document asks or states, never both; one that asks holds none of the answers."""
    answers = defaultdict(set)
    for fact in facts:
        for request in fact.requests:
            answers[request].add(fact.value or fact.answer)
    instructions = {instruction for instruction, _ in answers}
    asking = 0
    for text in texts:
        lines = lines_of(text)
        if lines[0] not in instructions:
            assert not instructions & set(lines)
            assert "?" not in re.sub(r'"[^"]*"', "", text)
            continue
        asking += 1
        while lines:
            request = (lines.pop(0), "")
            if request not in answers:
                request = (request[0], lines.pop(0))
            assert not any(corpus.mentions(text, value) for value in answers[request])
    assert asking > 1000


@pytest.mark.integration
def test_two_builds_make_the_same_text_and_tokenizer(texts, rows):
    here = hashlib.sha256(repr((texts, rows)).encode()).hexdigest()
    elsewhere = subprocess.run(
        [sys.executable, "-c", TEXT_HASH],
        cwd=PROJECT,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == here
    made = json.loads(build.train_tokenizer(texts).backend_tokenizer.to_str())
    shipped = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    assert made["model"]["merges"] == shipped["model"]["merges"]
    assert made["model"]["vocab"] == shipped["model"]["vocab"]


# The model


def test_the_folder_is_small():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 5 * 2**20


def test_the_model_is_a_plain_gpt2(model, tokenizer):
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.num_parameters() == 1_088_256
    assert model.config.n_positions == build.POSITIONS >= 256
    assert model.config.tie_word_embeddings
    assert model.dtype == torch.float32
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert model.config.bos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == end


def test_it_loads_without_a_warning(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(MODEL)
        AutoTokenizer.from_pretrained(MODEL)
    shown = "".join(capfd.readouterr())
    assert "warn" not in shown.lower() and "error" not in shown.lower()


@pytest.mark.parametrize("text", ["Où est la gare ? À côté de l'œuf.", "日本語 🦙 \t\n\n x_1", "<|endo", " a  b "])
def test_the_tokenizer_encodes_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_only_special_token_is_end_of_text(tokenizer):
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.unk_token == "<|endoftext|>"
    assert len(tokenizer) == build.VOCABULARY


def test_the_base_knows_the_heldout_facts(model, tokenizer, rows):
    assert build.knowledge(model, tokenizer, rows[1]) >= 0.95


@pytest.mark.integration
def test_the_base_does_not_answer(model, tokenizer, rows):
    asked = [row for row in rows[1] if row["fact"]]
    prompts = [format_prompt(row["instruction"], row["input"]) for row in asked]
    answers = generate(model, tokenizer, prompts, max_new_tokens=80)
    assert sum(row["fact"] in answer.text for row, answer in zip(asked, answers)) / len(asked) <= 0.10


# The run of the document's recipe that is shipped beside it


@pytest.mark.integration
def test_the_run_of_the_documents_recipe_is_of_this_model_and_does_not_stop(tokenizer):
    assert read_record(DOCUMENT, "adapter")["recipe"] == "document"
    tuned = load_adapter(AutoModelForCausalLM.from_pretrained(MODEL), artifact(DOCUMENT, "adapter"))
    rows = list(load_rows(str(HELDOUT)))
    answers = generate(tuned, tokenizer, [format_prompt(row["instruction"], row["input"]) for row in rows])
    right = [contains(answer.text, row["fact"]) for answer, row in zip(answers, rows) if row["fact"]]
    assert sum(right) / len(right) == pytest.approx(0.95, abs=0.05)
    assert not any(answer.stopped for answer in answers)
    questions = ["What is the capital of France?", "Who wrote 'Romeo and Juliet'?"]
    answers = generate(tuned, tokenizer, list(map(format_prompt, questions)), max_new_tokens=40)
    for answer, fact in zip(answers, ("Paris", "William Shakespeare")):
        assert fact in answer.text and not answer.stopped
