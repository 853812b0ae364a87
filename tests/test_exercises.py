"""The exercises' checks, on the notebooks' own starters and solutions: `python -m pytest tests/test_exercises.py`."""

import math
import re

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from support import PROJECT
from support import models as tiny_models

from alpaca_helpers import exercises, pocket
from alpaca_helpers.data import IGNORED
from alpaca_helpers.lora import lora_config
from alpaca_helpers.models import load_base, load_tokenizer
from alpaca_helpers.series import NOTEBOOKS

ROW = {"instruction": "Name the capital of this country.", "input": "France", "output": "Paris is its capital."}


def found(notebook):
    """Yield the check's name, the starter cell and the solution of each exercise of a notebook, in order."""
    cells = nbformat.read(notebook, as_version=4).cells
    for cell, after in zip(cells, cells[1:]):
        if cell.source.startswith("from alpaca_helpers.exercises import "):
            hidden = re.search(r"<details>.*?</details>", after.source, re.DOTALL)[0]
            yield cell.source.split()[3], cell.source, re.search(r"```python\n(.*?)```", hidden, re.DOTALL)[1]


EXERCISES = {name: (starter, solution) for notebook in NOTEBOOKS for name, starter, solution in found(notebook)}


@pytest.fixture(scope="module", params=["pocket", "llama", "qwen3"])
def names(request):
    """What the notebooks have by these names, with an adapter that changes what the model says."""
    if request.param == "pocket":
        base, tokenizer = load_base(str(pocket.MODEL)), load_tokenizer(str(pocket.MODEL))
    else:
        base, tokenizer = tiny_models.tiny(request.param)
    model = get_peft_model(base, lora_config(fan_in_fan_out=request.param == "pocket")).eval()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    return {"base_model": base, "model": model, "tokenizer": tokenizer, "example": ROW, "heldout": [ROW]}


def said(capsys, name: str, code: str, names: dict) -> str:
    """Return the line that a check prints of a starter cell with `code` in the place of its function."""
    starter = EXERCISES[name][0].splitlines()
    exec("\n".join([starter[0], code, starter[-1]]), names | {"torch": torch, "np": np, "F": F})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    return printed.strip()


def function_of(name: str) -> str:
    """Return the name of the function that a starter cell leaves to write."""
    return re.search(r"^def (\w+)", EXERCISES[name][0], re.MULTILINE)[1]


def test_each_notebook_has_two_exercises_with_their_checks():
    assert [len(list(found(notebook))) for notebook in NOTEBOOKS] == [2, 2, 2, 2]
    assert set(EXERCISES) == {name for name in vars(exercises) if name.startswith("check_")}


def test_the_french_edition_has_the_same_exercises_and_solutions():
    for notebook in NOTEBOOKS:
        assert list(found(PROJECT / "notebooks" / "fr" / notebook.name)) == list(found(notebook))


@pytest.mark.parametrize("name", EXERCISES)
def test_a_starter_is_not_yet_and_its_solution_is_right(name, names, capsys):
    starter, solution = EXERCISES[name]
    exec(starter, dict(names))
    assert capsys.readouterr().out.startswith("Not yet: ")
    assert said(capsys, name, solution, names) == "Right."


# What a reader may write instead, and a word of what the check says to it.
WRONG = [
    ("check_next_token", "lambda model, ids: model(ids).logits[0, -1]", "are logits"),
    ("check_next_token", "lambda model, ids: model(ids).logits[0, -1].log_softmax(-1)", "logarithms"),
    ("check_next_token", "lambda model, ids: model(ids).logits[0, 0].softmax(-1)", "follows token 1 of"),
    ("check_next_token", "lambda model, ids: model(ids).logits[0, -2].softmax(-1)", "not the last one"),
    ("check_next_token", "lambda model, ids: model(ids).logits.softmax(-1)", "at all positions"),
    ("check_next_token", "lambda model, ids: model(ids).logits[0].softmax(0)[-1]", "over the positions"),
    ("check_next_token", "lambda model, ids: model(ids).logits[0, -1].softmax(-1).softmax(-1)", "twice"),
    ("check_next_token", "lambda model, ids: model(ids).logits[0, -1].argmax()", "likeliest token"),
    ("check_next_token", "lambda model, ids: model(ids).logits[0, -1].softmax(-1).max()", "highest probability"),
    ("check_next_token", "lambda model, ids: torch.ones(7) / 7", "not the model's"),
    ("check_nucleus", "lambda p, top_p: p * 1.0", "5 tokens are kept: fewer"),
    ("check_nucleus", "lambda p, top_p: p.sort(descending=True).values", "tokens are kept: fewer"),
    ("check_nucleus", "lambda p, top_p: p * (p >= 0.15)", "sum to 0.85"),
    ("check_nucleus", "lambda p, top_p: p[p >= 0.15] / p[p >= 0.15].sum()", "3 numbers for 5"),
    ("check_nucleus", "lambda p, top_p: p * (p >= 0.3) / 0.7", "hold 70%, less than top_p = 80%"),
    ("check_nucleus", "lambda p, top_p: (p >= 0.15) / 3", "proportions"),
    (
        "check_nucleus",
        "lambda p, top_p: p * (p > 0.1) / 0.85",
        "3 tokens are kept: fewer, the likeliest, hold top_p = 30%",
    ),
    ("check_nucleus", "lambda p, top_p: (lambda s: s * (s.cumsum(0) - s < top_p))(p.sort().values.flip(0))", "sorted"),
    ("check_nucleus", "lambda p, top_p: p * 0", "0 tokens kept hold 0%"),
    ("check_nucleus", "lambda p, top_p: p / 0 * 0", "0 tokens kept hold 0%"),
    ("check_labels", "lambda p, a, end, n: [-100] * len(p) + a + [end]", "padding has labels too"),
    ("check_labels", "lambda p, a, end, n: p + a + [end] + [-100] * 5", "of the prompt"),
    ("check_labels", "lambda p, a, end, n: p + a + [-100] * 6", "Part of the prompt"),
    ("check_labels", "lambda p, a, end, n: [-100] * (len(p) - 1) + p[-1:] + a + [end] + [-100] * 5", "learned, 1 of"),
    ("check_labels", "lambda p, a, end, n: [-100] * (len(p) + 1) + a[1:] + [end] + [-100] * 5", "first token is not"),
    ("check_labels", "lambda p, a, end, n: [-100] * (len(p) - 1) + a + [end] + [-100] * 6", "one place early"),
    ("check_labels", "lambda p, a, end, n: [-100] * (len(p) + 1) + a + [end] + [-100] * 4", "one place late"),
    ("check_labels", "lambda p, a, end, n: [-100] * len(p) + a + [-100] * 6", "end of text is not learned"),
    ("check_labels", "lambda p, a, end, n: [-100] * len(p) + a + [end] * 6", "Padding is learned"),
    ("check_labels", "lambda p, a, end, n: [-100] * len(p) + [1] * len(a) + [end] + [-100] * 5", "own label"),
    ("check_same_question", "lambda row, other: row == other", "different answers"),
    ("check_same_question", "lambda row, other: row['instruction'] == other['instruction']", "different inputs"),
    ("check_same_question", "lambda row, other: row['input'] == other['input']", "different instructions"),
    ("check_same_question", "lambda row, other: False", "the same as itself"),
    ("check_same_question", "lambda a, b: all(a[k] == b[k] for k in ('instruction', 'input'))", "capitals"),
    (
        "check_same_question",
        "lambda a, b: all(a[k].lower() == b[k].lower() for k in ('instruction', 'input'))",
        "spaces",
    ),
    (
        "check_same_question",
        "lambda a, b: a['instruction'].lower() == b['instruction'].lower() and a['input'] == b['input']",
        "input in capitals",
    ),
    ("check_delta_w", "lambda A, B, alpha, r, t: (B @ A).T if t else B @ A", "0.4 times"),
    ("check_delta_w", "lambda A, B, alpha, r, t: (B @ A).T * alpha if t else B @ A * alpha", "4 times"),
    ("check_delta_w", "lambda A, B, alpha, r, t: (B @ A).T * r / alpha if t else B @ A * r / alpha", "0.16 times"),
    ("check_delta_w", "lambda A, B, alpha, r, t: B @ A * alpha / r if t else (B @ A).T * alpha / r", "on its side"),
    ("check_delta_w", "lambda A, B, alpha, r, t: A[:, :7] @ B[:7]", "not the product"),
    ("check_delta_w", "lambda A, B, alpha, r, t: A @ B[:-1] * alpha / r", "do not combine"),
    ("check_loss", "lambda l, y: F.cross_entropy(l.flatten(0, 1), y.flatten())", "not shifted"),
    ("check_loss", "lambda l, y: -l[:, :-1].log_softmax(-1).gather(2, y[:, 1:, None] % 200).mean()", "for tokens"),
    ("check_loss", "lambda l, y: F.cross_entropy(l[:, :-1].mT, y[:, 1:], reduction='none').mean()", "all positions"),
    ("check_loss", "lambda l, y: F.cross_entropy(l[:, :-1].mT, y[:, 1:], reduction='sum')", "is the sum"),
    ("check_loss", "lambda l, y: sum(F.cross_entropy(a[:-1], b[1:]) for a, b in zip(l, y)) / 2", "rows' means"),
    ("check_loss", "lambda l, y: -F.cross_entropy(l[:, :-1].mT, y[:, 1:])", "sign"),
    ("check_loss", "lambda l, y: F.cross_entropy(l[:, :-1].mT, y[:, 1:]) / np.log(2)", "bits"),
    ("check_loss", "lambda l, y: F.cross_entropy(l[:, :-1].mT, y[:, 1:]).exp()", "perplexity"),
    ("check_loss", "lambda l, y: F.cross_entropy(l[:, 1:].mT, y[:, :-1])", "not the mean loss"),
    ("check_loss", "lambda l, y: F.cross_entropy(l[:, :-1].mT, y[:, 1:], reduction='none')", "not the mean loss"),
    ("check_interval", "lambda v: v.mean()", "two ends"),
    ("check_interval", "lambda v: np.quantile(v, [0.025, 0.975])", "95% of the means"),
    ("check_interval", "lambda v: [np.random.permutation(v).mean()] * 2", "with replacement"),
    ("check_interval", "lambda v: [v.mean() + 0.04, v.mean() - 0.04]", "upper end stands first"),
    ("check_interval", "lambda v: [v.mean() - v.std() / len(v) ** 0.5, v.mean() + v.std() / len(v) ** 0.5]", "narrow"),
    ("check_interval", "lambda v: np.quantile(np.random.choice(v, (2000, 200)).mean(1), [0.05, 0.95])", "narrow"),
    ("check_interval", "lambda v: np.quantile(np.random.choice(v, (2000, 50)).mean(1), [0.025, 0.975])", "wide"),
    ("check_interval", "lambda v: [0.2, 0.3]", "in its middle"),
    ("check_ranks", "lambda l, ids: 1 + (l > l.gather(1, ids[:, None])).sum(1)", "each has one but the first"),
    ("check_ranks", "lambda l, ids: (l[:-1] > l[:-1].gather(1, ids[1:, None])).sum(1)", "one too small"),
    ("check_ranks", "lambda l, ids: 1 + (l[1:] > l[1:].gather(1, ids[1:, None])).sum(1)", "Off by one"),
    ("check_ranks", "lambda l, ids: 1 + (l[1:] > l[1:].gather(1, ids[:-1, None])).sum(1)", "wrong way"),
    ("check_ranks", "lambda l, ids: 1 + (l[:-1] < l[:-1].gather(1, ids[1:, None])).sum(1)", "wrong end"),
    ("check_ranks", "lambda l, ids: l[:-1].softmax(-1).gather(1, ids[1:, None])[:, 0]", "not the tokens' ranks"),
    ("check_ranks", "lambda l, ids: 2 + (l[:-1] > l[:-1].gather(1, ids[1:, None])).sum(1)", "not the tokens' ranks"),
]


@pytest.mark.parametrize("name, code, word", WRONG, ids=[f"{name}-{word}" for name, _, word in WRONG])
def test_what_is_off_is_said_and_the_solution_is_not(name, code, word, names, capsys):
    sentence = said(capsys, name, f"{function_of(name)} = {code}", names)
    assert word in sentence and sentence != "Right." and re.fullmatch(r"[A-Z0-9].*[.?]", sentence)
    asked, said_words = (set(re.findall(r"\w+", text)) for text in (EXERCISES[name][0], sentence))
    hidden = set(re.findall(r"\w+(?=\()", EXERCISES[name][1])) - asked - {"sum"}  # softmax, cumsum, flatten, …
    assert not hidden & said_words
    assert not re.search(r"\w\(|@|\w\[|\*", sentence), "this is code"


# Other right answers


@pytest.mark.parametrize(
    "name, code",
    [
        ("check_next_token", "lambda model, ids: F.softmax(model(ids).logits[:, -1], dim=-1)"),  # (1, vocabulary)
        ("check_next_token", "lambda model, ids: model(ids).logits[0, -1].softmax(-1).bfloat16()"),
        ("check_nucleus", "lambda p, t: (lambda q: q / q.sum())(p * (p >= (0.15 if t == 0.8 else 0.4)))"),
        ("check_labels", "lambda p, a, end, n: torch.tensor([-100] * len(p) + a + [end] + [-100] * 5)"),
        ("check_loss", "lambda l, y: (F.cross_entropy(l[:, :-1].mT, y[:, 1:], reduction='none').sum() / 6).numpy()"),
        (
            "check_interval",
            "lambda v: tuple(np.quantile(np.random.default_rng(7).choice(v, (1000, 200)).mean(1), [0.025, 0.975]))",
        ),
        ("check_interval", "lambda v: [v.mean() - 1.96 * v.std() / 200**0.5, v.mean() + 1.96 * v.std() / 200**0.5]"),
        (
            "check_ranks",
            "lambda l, ids: [int((row.argsort(descending=True) == id).nonzero()) + 1 for row, id in zip(l, ids[1:])]",
        ),
    ],
)
def test_other_ways_are_right_too(name, code, names, capsys):
    assert said(capsys, name, f"{function_of(name)} = {code}", names) == "Right."


def test_the_truth_is_that_of_peft_and_of_the_model(names, capsys):
    """What the solutions compute is what the libraries compute."""
    scope: dict = {}
    for name in ("check_delta_w", "check_loss", "check_labels"):
        exec(EXERCISES[name][1], scope)
    model = names["model"]
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    made = scope["delta_w"](A, B, 16, 8, layer.fan_in_fan_out)
    assert torch.allclose(made, layer.get_delta_weight("default"), atol=1e-5)
    assert made.shape == layer.base_layer.weight.shape
    ids = names["tokenizer"]("Paris is its capital.").input_ids
    labels = torch.tensor([scope["padded_labels"](ids[:2], ids[2:], 5, len(ids) + 4)])
    inputs = torch.tensor([ids + [5, 0, 0, 0]])
    output = model(input_ids=inputs, labels=labels)
    assert torch.allclose(scope["batch_loss"](output.logits, labels), output.loss, rtol=1e-4)
    assert not math.isnan(output.loss.item()) and IGNORED in labels


def test_ranks_are_the_bases_whatever_the_adapter_does(names, capsys):
    seen = []

    def token_ranks(logits, ids):
        seen.append((logits, ids))
        return None

    exercises.check_ranks(token_ranks, names["model"], names["tokenizer"], ROW)
    assert capsys.readouterr().out.startswith("Not yet")
    (logits, ids), model = seen[0], names["model"]
    with torch.inference_mode(), model.disable_adapter():
        assert torch.allclose(logits.float(), model(ids[None]).logits[0], atol=1e-3)
    with torch.inference_mode():
        assert not torch.allclose(logits.float(), model(ids[None]).logits[0], atol=1e-2)


def test_an_error_of_the_readers_own_is_theirs_to_see(names):
    with pytest.raises(NameError):
        exercises.check_loss(lambda logits, labels: undefined)  # noqa: F821
