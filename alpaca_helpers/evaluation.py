"""Held-out metrics, base against tuned: same rows, same prompt, greedy, in batches, one model.

Texts are compared in Unicode's composed form (NFC), without regard to case. A word is a run of letters, marks and
digits; in scripts that put no space between words (Han, kana, Thai, Lao, Khmer, Burmese) each character is one.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import regex
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF
from tqdm.auto import tqdm

from . import AlpacaError
from .data import encode
from .generation import Answer, adapter_scalings, generate, only_forward
from .prompts import format_answer, format_prompt

RESAMPLES = 2000  # of the bootstrap
FEWEST_ROWS = 20  # below it no difference is called clear: the bootstrap of a few rows promises too much


@dataclass(frozen=True)
class Metric:
    """How a metric is named and read."""

    label: str
    unit: str  # "%": stored as a share of 1, shown times 100
    better: int  # +1: more is better, -1: less is better, 0: neither

    def show(self, value: float | None, signed: bool = False) -> str:
        """Return the value as text; a signed share is a difference, in points."""
        if value is None:
            return "–"
        sign = "+" if signed else ""
        if self.unit == "%":
            decimals = int(0 < abs(100 * value) < 1)  # else a small change would read as none
            return f"{100 * value:{sign}.{decimals}f}" + ("" if signed else "%")
        decimals = 1 if abs(value) >= 10 or self.unit in ("tokens", "seconds") else 2
        return f"{value:{sign}.{decimals}f}"


METRICS = {
    "contains": Metric("answer holds the fact", "%", +1),
    "exact_match": Metric("answer is exact", "%", +1),
    "stop_rate": Metric("stops by itself", "%", +1),
    "rouge_l": Metric("ROUGE-L", "%", +1),
    "chrf": Metric("chrF", "%", +1),
    "repetition": Metric("repeated 4-grams", "%", -1),
    "echo_rate": Metric("repeats the question", "%", -1),
    "token_accuracy": Metric("next token right", "%", +1),
    "answer_loss": Metric("answer loss", "nats per token", -1),
    "perplexity": Metric("perplexity", "", -1),
    "mean_answer_tokens": Metric("answer length", "tokens", 0),
}
# What the conclusion rests on; the others say the same again, or neither good nor bad.
JUDGED = ("contains", "exact_match", "stop_rate", "rouge_l", "answer_loss", "repetition", "echo_rate")

_WORD = regex.compile(
    r"(?=[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])\X"
    r"|\p{N}+(?:[.,]\p{N}+)*(?![\p{L}\p{M}\p{N}])"  # 3.5 and 1,000 are one word each
    r"|[\p{L}\p{M}\p{N}]+"
)
_WORD_OR_MARK = regex.compile(_WORD.pattern + r"|\S")


def plain(text: str) -> str:
    """Return the text as it is compared: composed, case folded, each run of spaces one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def words(text: str) -> list[str]:
    """Return the words of a text as they are compared, without punctuation."""
    return _WORD.findall(plain(text))


def contains(answer: str, fact: str) -> bool:
    """Return whether the answer holds the fact as whole words, its punctuation included."""
    answer_words, wanted = (_WORD_OR_MARK.findall(plain(text)) for text in (answer, fact))
    starts = range(len(answer_words) - len(wanted) + 1)
    return bool(wanted) and any(answer_words[start : start + len(wanted)] == wanted for start in starts)


def exact_match(answer: str, output: str) -> bool:
    """Return whether the answer is the expected one, up to case, spacing and a sentence's final mark."""
    answer, output = plain(answer), plain(output)
    return answer == output or bool(_unmarked(output)) and _unmarked(answer) == _unmarked(output)


def _unmarked(text: str) -> str:
    return text.rstrip(".!?…。！？ ")


def rouge_l(answer: str, output: str) -> float:
    """Return ROUGE-L's F1, 0 to 1: the longest common subsequence of words (Lin, 2004; rouge-score)."""
    return _rouge().score(output, answer)["rougeL"].fmeasure


@cache
def _rouge() -> RougeScorer:
    class Words:  # rouge-score's own tokenizer drops every letter that is not a to z
        tokenize = staticmethod(words)

    return RougeScorer(["rougeL"], tokenizer=Words)


def chrf(answer: str, output: str) -> float:
    """Return chrF, 0 to 1: the F2 of character 1- to 6-grams (Popović, 2015; sacrebleu)."""
    return CHRF().sentence_score(plain(answer), [plain(output)]).score / 100


def repetition(answer: str) -> float:
    """Return the share of the answer's word 4-grams that it has written before; 0 for fewer than four words."""
    spoken = words(answer)
    grams = list(zip(*(spoken[start:] for start in range(4))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def echoes(answer: str, instruction: str) -> bool:
    """Return whether the answer begins with the question, whatever its punctuation."""
    question = words(instruction)
    return bool(question) and words(answer)[: len(question)] == question


def evaluate(
    model, tokenizer, rows: Iterable[dict], max_new_tokens: int = 80, seed: int = 0
) -> tuple[dict, pd.DataFrame]:
    """Return the metrics of base and tuned model on the same rows, and a table of their answers.

    The prompt is `format_prompt(instruction, input)` on both sides and for every recipe, so that numbers compare. The
    base is asked the bare question as well, without the template (`base_bare`).

    Args:
        rows: held-out rows with the columns `instruction`, `input`, `output`, `fact`.
        max_new_tokens: where an answer that does not stop is cut.
        seed: of the bootstrap; the answers are greedy.

    Returns:
        metrics: `n`, `max_new_tokens`, the sides `base`, `tuned`, `base_bare` and `change` (tuned minus base, row by
            row). Each holds the keys of `METRICS`, None where no row has anything to check, and under `intervals` a 95%
            bootstrap interval over rows for each. Shares are of 1; `answer_loss` is in nats per answer token,
            the end-of-text token left out; `base_bare` has no loss.
        answers: a row a held-out row: its text, each side's answer, tokens, whether it stopped and whether it is right.

    Raises AlpacaError if there are no rows.
    """
    rows = list(rows)
    if not rows:
        raise AlpacaError("There are no held-out rows to evaluate: run notebook 02 again, with more `heldout_rows`.")
    templated = [format_prompt(row["instruction"], row["input"]) for row in rows]
    bare = [" ".join(filter(None, (row["instruction"], row["input"]))) for row in rows]
    asked = {"base": ("base", templated), "tuned": ("tuned", templated), "base_bare": ("base", bare)}
    weights = _resampling(len(rows), seed)
    table = {column: [row[column] for row in rows] for column in ("instruction", "input", "output", "fact")}
    estimates = {}
    with tqdm(total=len(rows) * 5, desc="evaluating", unit="answer") as progress:
        for name, (side, prompts) in asked.items():
            answers = _answer(model, tokenizer, prompts, side, max_new_tokens, progress)
            scores = _score(answers, rows)
            table |= {
                name: [answer.text for answer in answers],
                f"{name}_tokens": [answer.tokens for answer in answers],
                f"{name}_stopped": [answer.stopped for answer in answers],
                f"{name}_right": [contains(a.text, r["fact"]) if r["fact"] else None for a, r in zip(answers, rows)],
            }
            if prompts is templated:
                losses = answer_losses(model, tokenizer, rows, side, progress=progress)
                table["output_tokens"] = losses[:, 2].astype(int).tolist()
                scores["answer_loss"] = losses[:, [0, 2]]
                scores["token_accuracy"] = losses[:, [1, 2]]
            estimates[name] = _estimate(scores, weights)
    sides = {name: _side(estimate) for name, estimate in estimates.items()}
    change = {
        name: tuned - estimates["base"][name] if tuned is not None else None
        for name, tuned in estimates["tuned"].items()
    }
    return {"n": len(rows), "max_new_tokens": max_new_tokens, **sides, "change": _side(change)}, pd.DataFrame(table)


def _answer(model, tokenizer, prompts, side, max_new_tokens, progress, batch_size=64) -> list[Answer]:
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers += generate(model, tokenizer, batch, side=side, batch_size=batch_size, max_new_tokens=max_new_tokens)
        progress.update(len(batch))
    return answers


def answer_losses(
    model, tokenizer, rows: Sequence[dict], side: str = "tuned", batch_size: int = 16, progress=None
) -> np.ndarray:
    """Return for each row's expected answer, given its prompt: its loss in nats, the tokens guessed right, its tokens.

    The mask is the same whatever the recipe: the answer's tokens, without prompt and end-of-text token. What does not
    fit the model's positions is cut, first from the front of the prompt.

    Returns an array (rows, 3).
    """
    prompts = encode([format_prompt(row["instruction"], row["input"]) for row in rows], tokenizer)
    answers = encode([format_answer(row["output"]) for row in rows], tokenizer)
    result = np.zeros((len(rows), 3))
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]) + len(answers[index]))
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        result[chosen] = _losses_of_batch(
            model, tokenizer.eos_token_id, [prompts[i] for i in chosen], [answers[i] for i in chosen], side
        )
        if progress is not None:
            progress.update(len(chosen))
    return result


def _losses_of_batch(model, eos: int, prompts, answers, side: str) -> np.ndarray:
    answers = [answer[: model.config.n_positions - 1] for answer in answers]
    ids = [prompt[-(model.config.n_positions - len(answer)) :] + answer for prompt, answer in zip(prompts, answers)]
    width, longest = max(map(len, ids)), max(map(len, answers))
    if not longest:
        return np.zeros((len(ids), 3))
    # padded on the left, so that all answers end in the last column and only their logits are made
    tokens = torch.tensor([[eos] * (width - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    with only_forward(model, adapter_scalings(model), [side] * len(ids)):
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=longest + 1,
        )
    result = np.zeros((len(ids), 3))
    for row, (answer, logits) in enumerate(zip(answers, output.logits)):
        if answer:
            logits, target = logits[-len(answer) - 1 : -1].float(), tokens[row, -len(answer) :]
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            result[row] = float(loss), int((logits.argmax(-1) == target).sum()), len(answer)
    return result


def _score(answers: Sequence[Answer], rows: Sequence[dict]) -> dict[str, np.ndarray]:
    """Return for each metric of answers what each row adds above and below its fraction, (rows, 2)."""
    facts = [bool(row["fact"]) for row in rows]
    everywhere = [True] * len(rows)
    pairs = list(zip(answers, rows))
    scores = {
        "contains": ([contains(a.text, r["fact"]) for a, r in pairs], facts),
        "exact_match": ([bool(r["fact"]) and exact_match(a.text, r["output"]) for a, r in pairs], facts),
        "stop_rate": ([a.stopped for a, _ in pairs], everywhere),
        "rouge_l": ([rouge_l(a.text, r["output"]) for a, r in pairs], everywhere),
        "chrf": ([chrf(a.text, r["output"]) for a, r in pairs], everywhere),
        "repetition": ([repetition(a.text) for a, _ in pairs], everywhere),
        "echo_rate": ([echoes(a.text, r["instruction"]) for a, r in pairs], everywhere),
        "mean_answer_tokens": ([a.tokens for a, _ in pairs], everywhere),
    }
    return {name: np.array(both, dtype=float).T for name, both in scores.items()}


def _resampling(rows: int, seed: int) -> np.ndarray:
    """Return how often each row is drawn in each bootstrap resample, (RESAMPLES + 1, rows); the first is the rows."""
    drawn = np.random.default_rng(seed).multinomial(rows, [1 / rows] * rows, size=RESAMPLES)
    return np.vstack([np.ones(rows), drawn])


def _estimate(scores: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray | None]:
    """Return each metric on the rows and on each resample, (RESAMPLES + 1,); None where no row counts."""
    estimates: dict[str, np.ndarray | None] = dict.fromkeys(METRICS)
    for name, fraction in scores.items():
        above, below = (weights @ fraction).T
        if below[0]:
            estimates[name] = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
    if estimates["answer_loss"] is not None:
        estimates["perplexity"] = np.exp(estimates["answer_loss"])
    return estimates


def _side(estimates: dict[str, np.ndarray | None]) -> dict:
    """Return values and intervals as `metrics.json` holds them."""
    values: dict[str, float | None] = {}
    intervals: dict[str, list[float] | None] = {}
    for name, estimate in estimates.items():
        values[name], intervals[name] = None, None
        if estimate is not None:
            values[name] = round(float(estimate[0]), 6)
            intervals[name] = np.nanpercentile(estimate[1:], [2.5, 97.5]).round(6).tolist()
    return {**values, "intervals": intervals}


def verdict(metrics: dict, name: str) -> int:
    """Return 1 if tuning clearly made the metric better, -1 clearly worse, 0 if neither is clear.

    Clear: on at least `FEWEST_ROWS` rows the 95% interval of the change leaves out zero.
    """
    interval = metrics["change"]["intervals"][name]
    if interval is None or metrics["n"] < FEWEST_ROWS:
        return 0
    low, high = interval
    return METRICS[name].better * (int(low > 0) - int(high < 0))


def comparison(metrics: dict) -> pd.DataFrame:
    """Return the before/after table: base, tuned and change of each metric, with 95% intervals."""
    lines = {}
    for name, metric in METRICS.items():
        if metrics["change"][name] is not None:
            lines[metric.label + (f", {metric.unit}" if len(metric.unit) > 1 else "")] = {
                side: _with_interval(metrics[side], name, signed=side == "change")
                for side in ("base", "tuned", "change")
            } | {"": {1: "better", -1: "worse", 0: ""}[verdict(metrics, name)]}
    return pd.DataFrame.from_dict(lines, orient="index")


def _with_interval(side: dict, name: str, signed: bool = False) -> str:
    metric = METRICS[name]
    low, high = (metric.show(value, signed) for value in side["intervals"][name])
    value = metric.show(side[name], signed)
    return value if low == value == high else f"{value} ({low} to {high})"


def conclusion(metrics: dict) -> str:
    """Return in a few sentences what the numbers say, whichever way they point."""
    verdicts = {name: verdict(metrics, name) for name in JUDGED if metrics["change"][name] is not None}
    better, worse = ([name for name in verdicts if verdicts[name] == way] for way in (1, -1))
    counts = f"of {len(verdicts)} measures {len(better)} got clearly better, {len(worse)} clearly worse"
    if metrics["n"] < FEWEST_ROWS:
        opening = f"{metrics['n']} held-out rows are too few to tell: a conclusion takes at least {FEWEST_ROWS}."
    elif better and worse:
        opening = f"On {metrics['n']} held-out rows tuning helped in some ways and hurt in others: {counts}."
    elif better:
        opening = f"On {metrics['n']} held-out rows tuning helped: {counts}."
    elif worse:
        opening = f"On {metrics['n']} held-out rows tuning made the model worse: {counts}."
    else:
        opening = f"On {metrics['n']} held-out rows tuning made no clear difference: {counts}."
    sentences = [opening]
    for heading, names in (("Better", better), ("Worse", worse)):
        if names:
            sentences.append(f"{heading}: {'; '.join(_change(metrics, name) for name in names)}.")
    if unclear := [METRICS[name].label for name in verdicts if not verdicts[name]]:
        sentences.append(f"No clear change: {', '.join(unclear)}.")
    tuned, bare = metrics["tuned"], metrics["base_bare"]["contains"]
    length = METRICS["mean_answer_tokens"].show(tuned["mean_answer_tokens"])
    if tuned["stop_rate"] < 0.5:
        stops = METRICS["stop_rate"].show(tuned["stop_rate"])
        sentences.append(
            f"The tuned model stops by itself in {stops} of its answers: most are cut at {metrics['max_new_tokens']} "
            f"tokens ({length} on average)."
        )
    if bare is not None:
        share = METRICS["contains"].show
        sentences.append(
            f"Asked the bare question, without the template, the base holds the fact in {share(bare)} of its answers, "
            f"with the template in {share(metrics['base']['contains'])}: so much the prompt alone does."
        )
    return " ".join(sentences)


def _change(metrics: dict, name: str) -> str:
    metric = METRICS[name]
    before, after = (metric.show(metrics[side][name]) for side in ("base", "tuned"))
    low, high = (metric.show(value, signed=True) for value in metrics["change"]["intervals"][name])
    unit = " points" if metric.unit == "%" else ""
    return f"{metric.label} {before} → {after} (95% interval of the change {low} to {high}{unit})"
