"""What the notebooks' prose says of their outputs, against the numbers: python -m pytest tests/test_true.py

For the pocket's stored outputs sentence by sentence; for a tuning that failed, another model and random weights the
sentences that cells compute.
"""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from alpaca_helpers import pocket
from alpaca_helpers.data import question_key
from alpaca_helpers.models import fetch_model, load_tokenizer
from alpaca_helpers.profiles import PROFILES
from alpaca_helpers.report import JUDGED
from alpaca_helpers.runs import read_metrics
from alpaca_helpers.series import NOTEBOOKS, run_series
from alpaca_helpers.text import words

CELLS = {
    cell["id"]: cell for notebook in NOTEBOOKS for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
}
ROWS = {
    side: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for side, path in (("train", pocket.TRAIN), ("heldout", pocket.HELDOUT))
}


def said(cell: dict) -> str:
    """Return the text of a cell's outputs."""
    parts = (
        part for output in cell["outputs"] for part in (output.get("text"), output.get("data", {}).get("text/plain"))
    )
    return "".join("".join(part) for part in parts if part)


def output(id: str) -> str:
    return said(CELLS[id])


def line(id: str, start: str) -> list[float]:
    """Return the numbers in the line of a cell's output that starts like this."""
    (found,) = (line for line in output(id).splitlines() if line.startswith(start))
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", found[len(start) :])]


def table(id: str) -> dict[str, list[float]]:
    """Return the rows of a table that a cell shows, wrapped or not: numbers by the row's name."""
    rows: dict[str, list[float]] = {}
    for text in output(id).splitlines():
        if found := re.match(r"(base|tuned|recipe|this run|base model).*?(?=  )", text):
            numbers = re.findall(r"\d+\.?\d*", text[found.end() :])
            rows.setdefault(found[0].strip(), []).extend(map(float, numbers))
    return rows


def in_training(question: str) -> bool:
    asked = question_key({"instruction": question, "input": ""})
    return asked in {question_key(row) for row in ROWS["train"]}


def with_facts(side: str) -> int:
    return sum(bool(row["fact"]) for row in ROWS[side])


QUESTIONS = ast.literal_eval(re.search(r"questions = (\[.*?\])", "".join(CELLS["04-09b"]["source"]), re.DOTALL)[1])
QUESTIONS += ["What are the three primary colors?", "Traduit : What happened ?"]

# The cell with the sentence, a part of it, and whether the stored outputs or the rows bear it out
SENTENCES = [
    ("01-26", "until it is cut at the limit", lambda: "0 of 4" in output("01-29")),
    ("01-32", "the first is `True` and the second is not", lambda: output("01-31").split() == expected_31()),
    ("02-07a", "short questions with answers of one sentence", lambda: one_sentence() > 0.9),
    ("02-11", "The pocket's *Tell me who wrote this*", lambda: "Tell me who wrote this." in output("02-10")),
    ("02-15", "appears in no training row", lambda: not any(map(named_in_training, capitals()))),
    ("02-41", "With the pocket 42, one more than `document`", lambda: line("02-27", "document:")[1] + 1 == 42),
    ("02-41", "889 of the pocket's 1,030", lambda: (short(10), len(ROWS["train"])) == (889, 1030)),
    ("03-26", "ten times the learning rate, and 10 epochs", lambda: settings() == (10, 10)),
    ("03-37k", "learns the words nearly as well as ours", lambda: table("03-37j")["recipe document"][0] < 0.1),
    ("03-37k", "even less likely than the base did", lambda: ends("recipe document") > ends("base model")),
    ("03-42g", "turns upwards", lambda: output("03-42h").endswith("True\n")),
    ("04-16", "None of the six is in the pocket's training rows", lambda: not any(map(in_training, QUESTIONS))),
    ("04-22", "257 of the pocket's 288", lambda: (with_facts("heldout"), len(ROWS["heldout"])) == (257, 288)),
    ("04-48", "They do not help the pocket", lambda: facts("base, 3 examples") <= facts("base")),
    (
        "04-48",
        "the facts are much the same on the pocket",
        lambda: abs(facts("tuned, recipe document") - tuned()) < 0.05,
    ),
    (
        "04-48",
        "and the end is not",
        lambda: (stops("tuned, recipe document"), stops("tuned, recipe answers")) == (0, 1),
    ),
    ("04-56", "four tokens in five are white", lambda: 75 <= line("04-55", "first choice")[0] <= 85),
    ("04-56", "its base's second choice each time", lambda: "{'second or third': 288}" in output("04-55")),
    ("04-64", "forgets next to nothing", lambda: table("04-63")["tuned, recipe answers"][0] > 99),
    ("04-37", "changed one token in five", lambda: 75 <= line("04-55", "first choice")[0] <= 85),
    ("04-37", "completes all 257", lambda: table("04-63")["base"][0] == 100),
]


def expected_31() -> list[str]:
    return "as a statement: True as an instruction: False".split()


def one_sentence() -> float:
    return sum(len(re.findall(r"[.!?](?:\s|$)", row["output"])) <= 1 for row in ROWS["train"]) / len(ROWS["train"])


def capitals() -> set[str]:
    """The countries whose capital is asked for on the held-out side."""
    found = (re.match(r"The capital of (.+?) is ", row["output"]) for row in ROWS["heldout"])
    countries = {country[1] for country in found if country}
    assert countries
    return countries


def named_in_training(country: str) -> bool:
    texts = (" ".join((row["instruction"], row["input"], row["output"])) for row in ROWS["train"])
    return any(re.search(rf"\b{re.escape(country)}\b", text) for text in texts)


def short(most: int) -> int:
    return sum(len(words(row["output"])) <= most for row in ROWS["train"])


def settings() -> tuple[float, float]:
    ours, theirs = PROFILES["pocket"], PROFILES["gpt2-medium"]
    return round(ours.learning_rate / theirs.learning_rate), ours.num_train_epochs


def ends(name: str) -> float:
    return table("03-37j")[name][1]


def facts(name: str) -> float:
    return table("04-47")[name][0]


def tuned() -> float:
    return facts("tuned, recipe answers")


def stops(name: str) -> float:
    return table("04-47")[name][2]


@pytest.mark.parametrize("id, sentence, holds", SENTENCES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_prose_says_of_the_pocket_is_what_its_outputs_say(id, sentence, holds):
    assert sentence in " ".join("".join(CELLS[id]["source"]).split())
    assert holds()


def test_a_sentence_with_a_count_or_a_share_says_of_which_model_it_is():
    named = re.compile(r"pocket|GPT-2|SmolLM2|Alpaca|document|H200|page", re.IGNORECASE)
    counted = re.compile(r"\d+(?:\.\d+)?%|\bof the \d+|\ball \d+|\b(?:four|one|two|three) \w+ in (?:four|five|ten)\b")
    for id, cell in CELLS.items():
        if cell["cell_type"] == "markdown" and not id.endswith(("92", "94")):  # solutions speak of functions
            for paragraph in "".join(cell["source"]).split("\n\n"):
                if counted.search(paragraph) and "interval" not in paragraph:  # its definition has numbers too
                    assert named.search(paragraph), (id, paragraph)


# Other outputs than the pocket's


@pytest.fixture(scope="module", params=["failed", "another", "random"])
def executed(request, tmp_path_factory) -> tuple[str, Path, dict[str, dict]]:
    """A run whose tuning changed nothing; the pocket under another name, or random weights, on rows without facts."""
    folder = tmp_path_factory.mktemp(request.param)
    parameters: dict[str, object] = {"run": str(folder / "run"), "profile": "pocket", "max_heldout_rows": 40}
    if request.param == "failed":
        parameters |= {"num_train_epochs": 0.001, "learning_rate": 1e-9}
    else:
        rows = [{**row, "fact": ""} for row in ROWS["train"][::8] if row["input"] or row["output"]]
        Dataset.from_list(rows).to_json(folder / "rows.jsonl")
        model = folder / "model"
        if request.param == "another":
            model.symlink_to(fetch_model(str(pocket.MODEL)))
        else:
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config.from_pretrained(pocket.MODEL)).save_pretrained(model)
            load_tokenizer(str(pocket.MODEL)).save_pretrained(model)
        parameters |= {"model": str(model), "dataset": str(folder / "rows.jsonl"), "num_train_epochs": 2}
    run = run_series(parameters)
    cells = [cell for path in sorted(run.glob("*.ipynb")) for cell in json.loads(path.read_text("utf-8"))["cells"]]
    return request.param, run, {cell["id"]: cell for cell in cells}


@pytest.mark.integration
def test_what_cells_say_is_what_the_numbers_of_this_run_say(executed):
    kind, run, cells = executed
    metrics = read_metrics(run)
    change = metrics["change"]
    conclusion = said(cells["04-28"]).splitlines()
    better = [
        name for name in ("answer_loss", "stop_rate") if clearly(change, name, -1 if name == "answer_loss" else 1)
    ]
    for name in ("answer_loss", "stop_rate"):
        assert f"{name} is clearly better after tuning: {name in better}" in said(cells["04-29"])
    state = json.loads(next((run / "checkpoints").glob("*/trainer_state.json")).read_text("utf-8"))
    loss = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry][-1]
    base = float(re.search(r"base: ([\d.]+) nats", said(cells["03-32b"]))[1])
    assert f"the held-out loss fell: {loss < base}" in said(cells["03-37"]) or abs(loss - base) < 1e-3
    if kind == "failed":
        assert conclusion[0] == "Tuning made no clear difference." and better == []
        assert metrics["tuned"]["stop_rate"] == metrics["base"]["stop_rate"]
    else:
        clear = any(clearly(change, name, way) for name in JUDGED for way in (1, -1))
        assert clear == (conclusion[0] != "Tuning made no clear difference.")
        assert kind == "random" or "answer_loss" in better
        assert "checkable" in metrics and "no run to compare with" in said(cells["04-44"])
        assert "recipe document" not in said(cells["03-37j"])


def clearly(change: dict, name: str, way: int) -> bool:
    low, high = change["intervals"][name] or (0, 0)
    return way * low > 0 and way * high > 0
