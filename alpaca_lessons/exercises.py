"""Checks of the notebooks' exercises: each prints "Right.", or one sentence on what is off, and never the solution.

A check calls the reader's function and compares what it returns with the truth, and with what usual mistakes give.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from alpaca_helpers import AlpacaError
from alpaca_helpers.data import IGNORED
from alpaca_helpers.generation import adapter_scalings, only_forward
from alpaca_helpers.prompts import format_answer, format_example, format_prompt


@contextmanager
def _exercise() -> Iterator[None]:
    """Print, as the decorator of a check, the sentence that it raises on what is off, or that the answer is right."""
    try:
        yield
        print("Right.")
    except AlpacaError as off:
        print(off)


def _expect(holds: object, sentence: str) -> None:
    if not holds:
        raise AlpacaError(sentence)


def _call(function: Callable, *arguments):
    made = function(*arguments)
    _expect(made is not None and made is not ..., "Not yet: the function returns nothing. Fill it in, then run again.")
    return made.detach().float().cpu().squeeze() if isinstance(made, torch.Tensor) else made


def _close(made: torch.Tensor, truth: torch.Tensor, rtol: float = 0.01) -> bool:
    """Return whether the two are equal up to what half precision rounds."""
    atol = 1e-4 * min(1.0, float(truth.abs().max()))  # a large vocabulary has small probabilities
    return made.shape == truth.shape and torch.allclose(made, truth, rtol=rtol, atol=atol)


def _compare(made, truth: torch.Tensor, mistakes: Mapping[str, torch.Tensor], otherwise: str, rtol=0.01) -> None:
    """Raise the sentence of the mistake that gives the same, unless it is the truth."""
    made = torch.as_tensor(made, dtype=torch.float32)
    if not _close(made, truth, rtol):
        raise AlpacaError(next((what for what, wrong in mistakes.items() if _close(made, wrong, rtol)), otherwise))


@_exercise()
def check_next_token(function: Callable, model, tokenizer) -> None:
    """Check `function(model, ids)`: the next token's probabilities, (vocabulary,), after ids (1, length)."""
    ids = torch.tensor([tokenizer("The capital of France is").input_ids], device=model.device)
    with torch.inference_mode():
        logits, made = model(ids).logits[0].float().cpu(), _call(function, model, ids)
    probs, last = logits.softmax(-1), len(logits)
    mistakes = {f"This is what follows token {n} of {last}, not the last one.": probs[n - 1] for n in range(1, last)}
    mistakes |= {
        "These are logits, scores of any size: not yet probabilities.": logits[-1],
        "These are the logarithms of the probabilities.": probs[-1].log(),
        "This is made into probabilities twice: once is enough.": probs[-1].softmax(-1),
        "The probabilities sum to 1 over the positions, and have to over the vocabulary.": logits.softmax(0)[-1],
        "These are the probabilities at all positions: one of them is about the next token.": probs,
        "That is the likeliest token: return the probability of each.": probs[-1].argmax().float(),
        "That is the highest probability: return that of each token.": probs[-1].max(),
    }
    _compare(made, probs[-1], mistakes, "These are not the model's probabilities of each token of the vocabulary.")


@_exercise()
def check_nucleus(function: Callable) -> None:
    """Check `function(probabilities, top_p)`: the probabilities, (vocabulary,), that top-p sampling draws from."""
    probs = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    for top_p, ids in ((0.8, [1, 3, 4]), (0.3, [1])):
        made = torch.as_tensor(_call(function, probs.clone(), top_p), dtype=torch.float32)
        _expect(made.shape == probs.shape, f"{made.numel()} numbers for 5 tokens: one left out has probability 0.")
        held, count = probs[made > 0].sum(), sum(made > 0)
        ordered = 0 < count < 5 and made.tolist() == sorted(made.tolist(), reverse=True)
        _expect(not ordered, "They are sorted: each token has to keep its place.")
        _expect(held > top_p, f"The {count} tokens kept hold {held:.0%}, less than top_p = {top_p:.0%}.")
        _expect(count == len(ids), f"{count} tokens are kept: fewer, the likeliest, hold top_p = {top_p:.0%}.")
        _expect(_close(made.sum(), torch.tensor(1.0)), f"They sum to {made.sum():.2f}: probabilities sum to 1.")
        _expect(_close(made[ids], probs[ids] / held), "The tokens kept do not keep their proportions.")


@_exercise()
def check_labels(function: Callable, tokenizer, row: dict) -> None:
    """Check `function(prompt_ids, answer_ids, end, length)`: the labels of a row padded to `length` tokens."""
    prompt = tokenizer(format_prompt(row["instruction"], row["input"])).input_ids
    answer = tokenizer(format_answer(row["output"]), add_special_tokens=False).input_ids
    end, start, stop = tokenizer.eos_token_id, len(prompt), len(prompt) + len(answer)
    truth = [IGNORED] * start + answer + [end] + [IGNORED] * 5
    made = [int(label) for label in _call(function, list(prompt), list(answer), end, len(truth))]
    _expect(len(made) == len(truth), f"{len(made)} labels for {len(truth)} tokens: padding has labels too.")
    _expect(made[:-1] != truth[1:], "All stand one place early: it is the loss that looks one token ahead.")
    _expect(made[1:] != truth[:-1], "All stand one place late.")
    learned = sum(label != IGNORED for label in made[:start])
    _expect(not learned, f"Part of the prompt is learned, {learned} of {start} tokens: it is always given.")
    _expect(made[start] != IGNORED, "The answer's first token is not learned.")
    _expect(made[start:stop] == answer, "Not every token of the answer is its own label.")
    _expect(made[stop] == end, "The end of text is not learned: the model would not know where to stop.")
    _expect(made == truth, "Padding is learned.")


@_exercise()
def check_same_question(function: Callable) -> None:
    """Check `function(row, other)`: whether two rows ask the same, whatever their case, spacing and answers."""
    row = {"instruction": "Tell me who wrote this.", "input": "Hamlet", "output": "William Shakespeare"}
    for sentence, same, change in (
        ("A row asks the same as itself.", True, {}),
        ("Rows with different instructions do not ask the same.", False, {"instruction": "Tell me the year of this."}),
        ("Rows with different inputs do not ask the same.", False, {"input": "Dracula"}),
        ("Rows with different answers may ask the same.", True, {"output": "Shakespeare"}),
        ("A question in capitals is the same.", True, {"instruction": "TELL ME WHO WROTE THIS."}),
        ("An input in capitals is the same.", True, {"input": "HAMLET"}),
        ("A question with more spaces is the same.", True, {"instruction": " Tell me  who wrote this.\n"}),
    ):
        _expect(bool(_call(function, dict(row), row | change)) == same, sentence)


@_exercise()
def check_delta_w(function: Callable, model) -> None:
    """Check `function(A, B, alpha, r, transposed)`: what LoRA adds to a weight of `model`, in that weight's shape."""
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    transposed, r, alpha, random = layer.fan_in_fan_out, 4, 10, torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=random) for shape in ((r, layer.in_features), (layer.out_features, r)))
    truth = (B @ A).T if transposed else B @ A
    try:
        made = _call(function, A, B, alpha, r, transposed)
    except RuntimeError:  # torch's, of shapes that do not fit
        raise AlpacaError(f"A is {tuple(A.shape)}, B is {tuple(B.shape)}: they do not combine like this.") from None
    scale = made.norm() / truth.norm()
    turned = f"Lying on its side: the base keeps this weight as {tuple(truth.shape)}, transposed is {transposed}."
    otherwise = f"This is {tuple(made.shape)}, the weight {tuple(truth.shape)}, and it is not the product of the two."
    _compare(made, truth * scale, {turned: truth.T * scale}, otherwise)
    factor = float(scale) * r / alpha
    _expect(math.isclose(factor, 1, rel_tol=1e-3), f"Right but for its scale: it is {factor:.3g} times as large.")


@_exercise()
def check_loss(function: Callable) -> None:
    """Check `function(logits, labels)`: the mean loss of a learned token, over a batch of two rows."""
    logits = 3 * torch.randn(2, 6, 200, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[IGNORED, IGNORED, 3, 1, 4, 5], [IGNORED, 2, 7, IGNORED, IGNORED, IGNORED]])
    made = _call(function, logits.clone(), labels.clone())
    before, targets = logits[:, :-1].mT, labels[:, 1:]
    nats, learned = F.cross_entropy(before, targets, reduction="none"), targets != IGNORED  # 0 where nothing is learned
    truth = nats.sum() / learned.sum()
    mistakes = {
        "The labels are not shifted: logits are about the token after theirs.": F.cross_entropy(logits.mT, labels),
        "Labels of -100 are taken for tokens: they are not learned.": F.cross_entropy(before, targets % 200),
        "The sum is divided by all positions, not by the learned ones.": nats.mean(),
        "That is the sum over the tokens: the mean is asked for.": nats.sum(),
        "A mean of the rows' means: a token of a short answer counts for more.": (nats.sum(1) / learned.sum(1)).mean(),
        "The sign is wrong: a loss is not negative.": -truth,
        "That is in bits, not in nats.": truth / math.log(2),
        "That is the mean probability, without a logarithm.": (-nats[learned]).exp().mean(),
        "That is the perplexity, the exponential of the loss.": truth.exp(),
    }
    _compare(made, truth, mistakes, "That is not the mean loss of the learned tokens.")


@_exercise()
def check_interval(function: Callable) -> None:
    """Check `function(values)`: the ends of a 95% bootstrap interval of their mean."""
    values = np.linspace(0, 1, 200) ** 2
    made = np.asarray(_call(function, values.copy()), dtype=float).flatten()
    _expect(made.size == 2, f"An interval has two ends, this has {made.size}.")
    _expect(made[0] <= made[1], "The upper end stands first.")
    _expect(made[1] - made[0] > 1e-9, "All resamples have the same mean: they are to be drawn with replacement.")
    error = values.std() / math.sqrt(len(values))  # of the mean
    width = (made[1] - made[0]) / (2 * 1.96 * error)
    _expect(width < 10, "That holds 95% of the values: the interval is to hold 95% of the means.")
    _expect(abs(made.mean() - values.mean()) < error / 2, "The mean of the values is not in its middle.")
    _expect(width > 0.9, f"Too narrow, {width:.2f} times as wide as it should be: is that 95%?")
    _expect(width < 1.1, f"Too wide, {width:.2f} times: does each resample have as many values as there are?")


@_exercise()
def check_ranks(function: Callable, model, tokenizer, row: dict) -> None:
    """Check `function(logits, ids)`: each token's rank under the base, 1 the likeliest, from the second token on."""
    text = format_example(row["instruction"], row["output"], row["input"])
    ids = torch.tensor(tokenizer(text).input_ids[:64], device=model.device)
    with only_forward(model, adapter_scalings(model), ["base"]):
        logits = model(ids[None]).logits[0].double()
        logits += 1e-6 * torch.rand_like(logits)  # in half precision some are the same: now each has one rank

    def ranks(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (1.0 + (logits > logits.gather(1, ids[:, None])).sum(1)).cpu()

    truth = ranks(logits[:-1], ids[1:])
    mistakes = {
        "All are one too small: the likeliest token has rank 1.": truth - 1,
        "Off by one: the logits at a position are about the token after it.": ranks(logits[1:], ids[1:]),
        "Shifted the wrong way: the logits at a position are about the token after it.": ranks(logits[1:], ids[:-1]),
        "Counted from the wrong end: the likeliest token has rank 1.": ranks(-logits[:-1], ids[1:]),
    }
    made = _call(function, logits.clone(), ids)
    _expect(len(made) == len(ids) - 1, f"{len(made)} ranks for {len(ids)} tokens: each has one but the first.")
    _compare(made, truth, mistakes, "These are not the tokens' ranks.", rtol=0)
