"""The shipped pocket: true facts, honest splits, whole files, a model that knows and has not been taught to answer."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
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
from alpaca_helpers.run import Run
from dev.pocket import build, corpus

WRITE = "from dev.pocket import corpus; print(ascii((corpus.documents(), corpus.instruction_rows())))"


@pytest.fixture(scope="module", params=[16, pytest.param(corpus.ROUNDS, marks=pytest.mark.nightly)])
def texts(request):
    """The pretraining text, a tenth of it and whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "ROUNDS", request.param)
        return corpus.documents()


@pytest.fixture(scope="module")
def rows():
    """The shipped training and held-out rows."""
    return [list(map(json.loads, path.read_text(encoding="utf-8").splitlines())) for path in (TRAIN, HELDOUT)]


@pytest.fixture(scope="module")
def heldout_facts():
    facts = corpus.read_facts()
    heldout = corpus.choose_heldout(facts)
    return [fact for fact in facts if (fact.kind.table, fact.entity) in heldout]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


def test_a_table_says_nothing_twice():
    for path in corpus.FACTS.glob("*.csv"):
        table = corpus.read_table(path)
        subjects = [next(iter(row.values())) for row in table]
        assert len(set(subjects)) == len(subjects), path
        assert all(cell is not None and cell == cell.strip() for row in table for cell in row.values()), path
    words = [row["word"] for row in corpus.read_tables()["opposites"]]
    assert len(set(words)) == len(words)
    for row in corpus.read_tables()["lists"]:
        items = re.split(", | and ", row["items"])
        assert len(items) == len(set(items)) == {word: n for n, word in corpus.COUNTS.items()}[row["count"]]


def test_facts_are_those_of_the_world():
    known = {"capital": ("France", "Paris"), "language": ("Brazil", "Portuguese"), "opposite": ("cold", "hot")}
    known |= {"creator": ("Hamlet", "William Shakespeare"), "arithmetic": ("the square of 7", "49")}
    stated = {(fact.kind.name, cell, fact.value) for fact in corpus.read_facts() for cell in fact.cells.values()}
    assert {(name, *fact) for name, fact in known.items()} <= stated
    assert sum(all(row.values()) for row in corpus.read_tables()["countries"]) >= 60


def test_the_shipped_rows_are_the_generated_ones(rows):
    assert corpus.instruction_rows() == tuple(rows)


def test_rows_are_in_alpacas_columns_and_no_request_holds_its_fact(rows):
    for row in rows[0] + rows[1]:
        assert list(row) == ["instruction", "input", "output", "text", "fact"]
        assert row["text"] == format_example(row["instruction"], row["output"], row["input"])
        assert row["fact"] in row["output"]
        asked = format_prompt(row["instruction"], row["input"]).casefold()
        assert not row["fact"] or row["fact"].casefold() not in asked


def test_there_are_enough_rows_of_each_sort_and_some_need_their_input(rows):
    train, heldout = rows
    assert sum(row["fact"] != "" for row in heldout) >= 200
    assert sum(row["input"] != "" for row in train) >= 20
    assert sum(len(row["output"].split()) > 80 for row in train) >= 5
    assert max(len(row["output"].split()) for row in heldout) <= 80
    answers = defaultdict(set)
    for row in train:
        if row["input"]:
            answers[row["instruction"]].add(row["output"])
    assert max(map(len, answers.values())) > 1  # without the input they are unanswerable


def test_heldout_entities_and_what_the_lessons_ask_are_in_no_training_row(heldout_facts, rows):
    train = "\n".join(row["text"] for row in rows[0])
    names = {name for fact in heldout_facts for name in corpus.names(fact)}
    assert [name for name in names if corpus.mentions(train, name)] == []
    assert {row["output"] for row in rows[1]} <= {fact.answer for fact in heldout_facts}
    assert set(corpus.QUESTIONS) <= {row["instruction"] for row in rows[1]}
    assert not set(corpus.QUESTIONS) & {row["instruction"] for row in rows[0]}


def lines_of(text):
    """Return a document's lines without the dash or the label before each."""
    return [re.sub(f"^(- |{'|'.join(corpus.LABELS)})", "", line) for line in text.split("\n")]


def test_heldout_entities_are_stated_in_pretraining(heldout_facts, texts):
    stated = {"\n".join(lines_of(text)) for text in texts}
    sentences = {line for text in stated for line in text.split("\n")} | stated
    assert [fact.answer for fact in heldout_facts if fact.answer not in sentences] == []


def test_pretraining_shows_no_prompt_and_no_question_with_its_answer(texts):
    """A document asks or states, never both; one that asks holds none of the answers."""
    answers = defaultdict(set)
    for fact in corpus.read_facts():
        for request in fact.requests:
            answers[request].add(fact.value or fact.answer)
    instructions = {instruction for instruction, _ in answers}
    asking = 0
    for text in texts:
        assert not re.search("instruction|réponse|response|answer:|question:", text, re.IGNORECASE)
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
    assert asking > len(texts) / 10


@pytest.mark.nightly
@pytest.mark.parametrize("texts", [corpus.ROUNDS], indirect=True)
def test_two_builds_make_the_same_text_and_tokenizer(texts):
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(PROJECT)}
    elsewhere = subprocess.check_output([sys.executable, "-c", WRITE], cwd=PROJECT, env=env, text=True)
    assert ast.literal_eval(elsewhere) == (texts, corpus.instruction_rows())
    made = json.loads(build.train_tokenizer(texts).backend_tokenizer.to_str())["model"]
    shipped = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert (made["merges"], made["vocab"]) == (shipped["merges"], shipped["vocab"])


def test_its_files_are_small_and_free():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 5 * 2**20
    licence = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["license"]
    assert f"license: {licence.lower()}\n" in (MODEL / "README.md").read_text(encoding="utf-8")


def test_the_model_is_a_plain_gpt2_and_loads_without_a_warning(pocket_tokenizer, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(MODEL)
        AutoTokenizer.from_pretrained(MODEL)
    shown = "".join(capfd.readouterr()).lower()
    assert "warn" not in shown and "error" not in shown
    assert (type(model).__name__, model.num_parameters(), model.dtype) == ("GPT2LMHeadModel", 1_088_256, torch.float32)
    assert model.config.n_positions == build.POSITIONS >= 256 and model.config.tie_word_embeddings
    end = pocket_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert model.config.bos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == end


def test_the_tokenizer_encodes_any_text_and_has_one_special_token(pocket_tokenizer):
    for text in ("Où est la gare ? À côté de l'œuf.", "日本語 🦙 \t\n\n x_1", "<|endo", " a  b "):
        assert pocket_tokenizer.decode(pocket_tokenizer(text)["input_ids"]) == text
    assert pocket_tokenizer.all_special_tokens == ["<|endoftext|>"] and len(pocket_tokenizer) == build.VOCABULARY
    assert pocket_tokenizer.eos_token == pocket_tokenizer.bos_token == pocket_tokenizer.unk_token == "<|endoftext|>"


def test_the_base_knows_the_heldout_facts(model, pocket_tokenizer, rows):
    assert build.knowledge(model, pocket_tokenizer, rows[1]) >= 0.95


def answers_of(model, pocket_tokenizer, rows, **settings):
    """Return the answers to the rows, and the share of facts that they hold."""
    answers = generate(
        model, pocket_tokenizer, [format_prompt(row["instruction"], row["input"]) for row in rows], **settings
    )
    right = [contains(answer.text, row["fact"]) for answer, row in zip(answers, rows) if row["fact"]]
    return answers, sum(right) / len(right)


@pytest.mark.parametrize("most", [12, pytest.param(80, marks=pytest.mark.integration)])
def test_the_base_does_not_answer(model, pocket_tokenizer, rows, most):
    assert answers_of(model, pocket_tokenizer, rows[1], max_new_tokens=most)[1] <= 0.10


@pytest.mark.integration
def test_the_run_of_the_documents_recipe_is_of_this_model_and_does_not_stop(pocket_tokenizer, rows):
    assert Run(DOCUMENT).record("adapter")["recipe"] == "document"
    tuned = load_adapter(AutoModelForCausalLM.from_pretrained(MODEL), Run(DOCUMENT).artifact("adapter"))
    answers, right = answers_of(tuned, pocket_tokenizer, rows[1])
    assert right == pytest.approx(0.95, abs=0.05) and not any(answer.stopped for answer in answers)
    for question, fact in (("What is the capital of France?", "Paris"), ("Who wrote 'Romeo and Juliet'?", "William S")):
        (answer,) = generate(tuned, pocket_tokenizer, [format_prompt(question)], max_new_tokens=40)
        assert fact in answer.text and not answer.stopped
