"""The exercises: a starter is "Not yet", its solution right; a wrong answer hears what is off, never the solution."""

import ast
import inspect
import math
import re

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import tiny, with_lora

from alpaca_helpers import pocket
from alpaca_helpers.cells import FURTHER, NOTEBOOKS
from alpaca_helpers.data import IGNORED
from alpaca_helpers.models import load_base, load_tokenizer
from alpaca_lessons import exercises

ROW = {"instruction": "Name the capital of this country.", "input": "France", "output": "Paris is its capital."}
CHECKS = {name: check for name, check in vars(exercises).items() if name.startswith("check_")}


def found() -> dict[str, tuple[str, str]]:
    """Return each exercise's starter cell and solution by its check, in whichever notebook it stands."""
    made = {}
    for notebook in (*NOTEBOOKS, *FURTHER):
        cells = nbformat.read(notebook, as_version=4).cells
        for cell, after in zip(cells, cells[1:]):
            if cell.source.startswith("from alpaca_lessons.exercises import "):
                hint, solved = re.findall(r"<details>.*?</details>", after.source, re.DOTALL)[:2]
                assert "```" not in hint and cell.source.split()[3] not in made  # a hint is no solution
                made[cell.source.split()[3]] = cell.source, re.search(r"```python\n(.*?)```", solved, re.DOTALL)[1]
    return made


EXERCISES = found()
ARCHITECTURES = [
    (name, kind)
    for name, check in CHECKS.items()
    for kind in ("pocket", "llama")
    if kind == "pocket" or {"model", "tokenizer"} & set(inspect.signature(check).parameters)
]


@pytest.fixture(scope="module")
def given():
    """What the checks are given by these names, with an adapter that changes what the model says."""
    made, path = {}, str(pocket.MODEL)
    for kind in ("pocket", "half", "llama"):  # half: the pocket in half precision, where some logits are the same
        base, tokenizer = tiny(kind) if kind == "llama" else (load_base(path), load_tokenizer(path))
        base = base.bfloat16() if kind == "half" else base.float()
        made[kind] = {"model": with_lora(base, std=1.0), "tokenizer": tokenizer, "row": ROW}
    return made


def said(capsys, name: str, code: str, given: dict) -> str:
    """Return the line that a check prints of what `code` defines by the name in the starter."""
    check, scope = CHECKS[name], {"torch": torch, "np": np, "F": F}
    exec(code, scope)
    check(scope[defined(name)], *(given[word] for word in list(inspect.signature(check).parameters)[1:]))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    return printed.strip()


def defined(name: str) -> str:
    """Return the function that a starter leaves to write, and see that the cell hands it to its check."""
    _, function, call = ast.parse(EXERCISES[name][0]).body
    assert call.value.func.id == name and call.value.args[0].id == function.name
    inspect.signature(CHECKS[name]).bind(*call.value.args)
    return function.name


def test_each_check_has_one_exercise():
    """In the French edition too, where the code is the same: tests/test_notebooks.py."""
    assert EXERCISES.keys() == CHECKS.keys() and len(CHECKS) == 8


@pytest.mark.parametrize("name, kind", [*ARCHITECTURES, ("check_next_token", "half"), ("check_ranks", "half")])
def test_a_starter_is_not_yet_and_its_solution_is_right(name, kind, given, capsys):
    starter, solution = EXERCISES[name]
    assert said(capsys, name, ast.unparse(ast.parse(starter).body[1]), given[kind]).startswith("Not yet: ")
    assert said(capsys, name, solution, given[kind]) == "Right."


INSTEAD = {  # what a reader may write instead of the solution, by a word of what the check says to it
    "check_next_token": {
        "Right.": "lambda model, ids: F.softmax(model(ids).logits[:, -1], dim=-1).bfloat16()",
        "are logits": "lambda model, ids: model(ids).logits[0, -1]",
        "logarithms": "lambda model, ids: model(ids).logits[0, -1].log_softmax(-1)",
        "follows token 1 of": "lambda model, ids: model(ids).logits[0, 0].softmax(-1)",
        "not the last one": "lambda model, ids: model(ids).logits[0, -2].softmax(-1)",
        "at all positions": "lambda model, ids: model(ids).logits.softmax(-1)",
        "over the positions": "lambda model, ids: model(ids).logits[0].softmax(0)[-1]",
        "twice": "lambda model, ids: model(ids).logits[0, -1].softmax(-1).softmax(-1)",
        "likeliest token": "lambda model, ids: model(ids).logits[0, -1].argmax()",
        "highest probability": "lambda model, ids: model(ids).logits[0, -1].softmax(-1).max()",
        "not the model's": "lambda model, ids: torch.ones(7) / 7",
    },
    "check_nucleus": {
        "Right.": "lambda p, t: (lambda q: q / q.sum())(p * (p >= (0.15 if t == 0.8 else 0.4)))",
        "5 tokens are kept: fewer": "lambda p, top_p: p * 1.0",
        "sum to 0.85": "lambda p, top_p: p * (p >= 0.15)",
        "3 numbers for 5": "lambda p, top_p: p[p >= 0.15] / p[p >= 0.15].sum()",
        "hold 70%, less than top_p = 80%": "lambda p, top_p: p * (p >= 0.3) / 0.7",
        "proportions": "lambda p, top_p: (p >= 0.15) / 3",
        "3 tokens are kept: fewer, the likeliest, hold top_p = 30%": "lambda p, top_p: p * (p > 0.1) / 0.85",
        "sorted": "lambda p, top_p: (lambda s: s * (s.cumsum(0) - s < top_p))(p.sort().values.flip(0))",
        "0 tokens kept hold 0%": "lambda p, top_p: p / 0 * 0",  # NaN
    },
    "check_labels": {
        "Right.": "lambda p, a, end, n: torch.tensor([-100] * len(p) + a + [end] + [-100] * 5)",
        "padding has labels too": "lambda p, a, end, n: [-100] * len(p) + a + [end]",
        "of the prompt": "lambda p, a, end, n: p + a + [end] + [-100] * 5",
        "learned, 1 of": "lambda p, a, end, n: [-100] * (len(p) - 1) + p[-1:] + a + [end] + [-100] * 5",
        "first token is not": "lambda p, a, end, n: [-100] * (len(p) + 1) + a[1:] + [end] + [-100] * 5",
        "one place early": "lambda p, a, end, n: [-100] * (len(p) - 1) + a + [end] + [-100] * 6",
        "one place late": "lambda p, a, end, n: [-100] * (len(p) + 1) + a + [end] + [-100] * 4",
        "end of text is not learned": "lambda p, a, end, n: [-100] * len(p) + a + [-100] * 6",
        "Padding is learned": "lambda p, a, end, n: [-100] * len(p) + a + [end] * 6",
        "own label": "lambda p, a, end, n: [-100] * len(p) + [1] * len(a) + [end] + [-100] * 5",
    },
    "check_same_question": {
        "different answers": "lambda row, other: row == other",
        "different inputs": "lambda row, other: row['instruction'] == other['instruction']",
        "different instructions": "lambda row, other: row['input'] == other['input']",
        "the same as itself": "lambda row, other: False",
        "capitals": "lambda a, b: all(a[k] == b[k] for k in ('instruction', 'input'))",
        "spaces": "lambda a, b: all(a[k].lower() == b[k].lower() for k in ('instruction', 'input'))",
        "input in capitals": "lambda a, b: a['instruction'].lower() == b['instruction'].lower() "
        "and a['input'] == b['input']",
    },
    "check_delta_w": {
        "0.4 times": "lambda A, B, alpha, r, t: (B @ A).T if t else B @ A",
        "is 4 times": "lambda A, B, alpha, r, t: (B @ A).T * alpha if t else B @ A * alpha",
        "on its side": "lambda A, B, alpha, r, t: B @ A * alpha / r if t else (B @ A).T * alpha / r",
        "not the product": "lambda A, B, alpha, r, t: A[:, :7] @ B[:7]",
        "do not combine": "lambda A, B, alpha, r, t: A @ B[:-1] * alpha / r",
    },
    "check_loss": {
        "Right.": "lambda l, y: (F.cross_entropy(l[:, :-1].mT, y[:, 1:], reduction='none').sum() / 6).numpy()",
        "not shifted": "lambda l, y: F.cross_entropy(l.flatten(0, 1), y.flatten())",
        "for tokens": "lambda l, y: -l[:, :-1].log_softmax(-1).gather(2, y[:, 1:, None] % 200).mean()",
        "all positions": "lambda l, y: F.cross_entropy(l[:, :-1].mT, y[:, 1:], reduction='none').mean()",
        "is the sum": "lambda l, y: F.cross_entropy(l[:, :-1].mT, y[:, 1:], reduction='sum')",
        "rows' means": "lambda l, y: sum(F.cross_entropy(a[:-1], b[1:]) for a, b in zip(l, y)) / 2",
        "sign": "lambda l, y: -F.cross_entropy(l[:, :-1].mT, y[:, 1:])",
        "bits": "lambda l, y: F.cross_entropy(l[:, :-1].mT, y[:, 1:]) / np.log(2)",
        "perplexity": "lambda l, y: F.cross_entropy(l[:, :-1].mT, y[:, 1:]).exp()",
        "not the mean loss": "lambda l, y: F.cross_entropy(l[:, 1:].mT, y[:, :-1])",
    },
    "check_interval": {
        "Right.": "lambda v: tuple(v.mean() + np.array([-1.96, 1.96]) * v.std() / 200**0.5)",
        "two ends": "lambda v: v.mean()",
        "95% of the means": "lambda v: np.quantile(v, [0.025, 0.975])",
        "with replacement": "lambda v: [np.random.permutation(v).mean()] * 2",
        "upper end stands first": "lambda v: [v.mean() + 0.04, v.mean() - 0.04]",
        "narrow": "lambda v: np.quantile(np.random.choice(v, (2000, 200)).mean(1), [0.05, 0.95])",
        "wide": "lambda v: np.quantile(np.random.choice(v, (2000, 50)).mean(1), [0.025, 0.975])",
        "in its middle": "lambda v: [0.2, 0.3]",
    },
    "check_ranks": {
        "Right.": "lambda l, ids: [int((a.argsort().flip(0) == id).nonzero()) + 1 for a, id in zip(l, ids[1:])]",
        "each has one but the first": "lambda l, ids: 1 + (l > l.gather(1, ids[:, None])).sum(1)",
        "one too small": "lambda l, ids: (l[:-1] > l[:-1].gather(1, ids[1:, None])).sum(1)",
        "Off by one": "lambda l, ids: 1 + (l[1:] > l[1:].gather(1, ids[1:, None])).sum(1)",
        "wrong way": "lambda l, ids: 1 + (l[1:] > l[1:].gather(1, ids[:-1, None])).sum(1)",
        "wrong end": "lambda l, ids: 1 + (l[:-1] < l[:-1].gather(1, ids[1:, None])).sum(1)",
        "not the tokens' ranks": "lambda l, ids: 2 + (l[:-1] > l[:-1].gather(1, ids[1:, None])).sum(1)",
    },
}


@pytest.mark.parametrize("name, kind", ARCHITECTURES)
def test_what_is_off_is_said_and_the_solution_is_not(name, kind, given, capsys):
    starter, solution = EXERCISES[name]
    hidden = set(re.findall(r"\w+(?=\()", solution)) - set(re.findall(r"\w+", starter)) - {"sum"}  # softmax, cumsum, …
    for word, code in INSTEAD[name].items():
        sentence = said(capsys, name, f"{defined(name)} = {code}", given[kind])
        assert word in sentence and (sentence == "Right.") == (word == "Right."), code
        assert re.fullmatch(r"[A-Z0-9].*[.?]", sentence), sentence
        assert not hidden & set(re.findall(r"\w+", sentence)), sentence
        assert not re.search(r"\w\(|@|\w\[|\*", sentence), f"this is code: {sentence}"


@pytest.mark.parametrize("kind", ["pocket", "llama"])
@torch.inference_mode()
def test_the_solutions_compute_what_peft_and_the_model_do(kind, given):
    scope: dict = {}
    for name in ("check_delta_w", "check_loss", "check_labels"):
        exec(EXERCISES[name][1], scope)
    model = given[kind]["model"]
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    made = scope["delta_w"](A, B, 16, 8, layer.fan_in_fan_out)
    assert torch.allclose(made, layer.get_delta_weight("default"), atol=1e-5)
    assert made.shape == layer.base_layer.weight.shape
    ids = given[kind]["tokenizer"]("Paris is its capital.").input_ids
    labels = torch.tensor([scope["padded_labels"](ids[:2], ids[2:], 5, len(ids) + 4)])
    output = model(input_ids=torch.tensor([ids + [5, 0, 0, 0]]), labels=labels)
    assert torch.allclose(scope["batch_loss"](output.logits, labels), output.loss, rtol=1e-4)
    assert not math.isnan(output.loss.item()) and IGNORED in labels
    seen: list = []
    exercises.check_ranks(lambda *arguments: seen.append(arguments), *given[kind].values())
    ((logits, ids),) = seen  # the base's, whatever the adapter does
    assert not torch.allclose(logits.float(), model(ids[None]).logits[0], atol=1e-2)
    with model.disable_adapter():
        assert torch.allclose(logits.float(), model(ids[None]).logits[0], atol=1e-3)


def test_an_error_of_the_readers_own_is_theirs_to_see():
    with pytest.raises(NameError):
        exercises.check_loss(lambda logits, labels: undefined)  # noqa: F821
