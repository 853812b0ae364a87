"""Held-out metrics, base against tuned: same rows, same prompt, greedy, in batches, one model."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import trange

from . import AlpacaError
from .data import question_key
from .generation import Answer, adapter_scalings, generate, only_forward
from .metrics import METRICS, chrf, contains, echoes, exact_match, repetition, rouge_l
from .models import positions
from .prompts import encode, format_answer, format_prompt

RESAMPLES = 2000  # of the bootstrap
FEWEST_QUESTIONS = 20  # below it no difference is called clear: the bootstrap of a few promises too much
# What the conclusion rests on; the others say the same again, or neither good nor bad.
JUDGED = ("contains", "exact_match", "rouge_l", "stop_rate", "repetition", "echo_rate", "answer_loss")


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
        metrics: `n` (rows), `questions` (different ones), `max_new_tokens`, the sides `base`, `tuned`, `base_bare` and
            `change` (tuned minus base, row by row). Each holds the keys of `METRICS`, None where no row has anything to
            check, and under `intervals` a 95% bootstrap interval for each: it resamples questions, since rows that ask
            the same one tell less than different ones. Shares are of 1; `answer_loss` is in nats per answer token, the
            end-of-text token left out; `base_bare` has no loss.
        answers: a row a held-out row: its text; each side's answer, its tokens, whether it stopped and whether it is
            right, and the loss of the expected answer.

    Raises AlpacaError if there are no rows.
    """
    rows = list(rows)
    if not rows:
        raise AlpacaError("There are no held-out rows: run notebook 02 again, with more `heldout_rows`.", "no-rows")
    templated = [format_prompt(row["instruction"], row["input"]) for row in rows]
    bare = [" ".join(filter(None, (row["instruction"], row["input"]))) for row in rows]
    asked = {"base": ("base", templated), "tuned": ("tuned", templated), "base_bare": ("base", bare)}
    answers: dict[str, list[Answer]] = {name: [] for name in asked}
    losses = {name: np.full((len(rows), 3), np.nan) for name in asked}
    for start in trange(0, len(rows), 64, desc="evaluating", unit="batch"):  # as many as `generate` takes at once
        part = slice(start, start + 64)
        for name, (side, prompts) in asked.items():
            answers[name] += generate(model, tokenizer, prompts[part], side=side, max_new_tokens=max_new_tokens)
            if prompts is templated:
                losses[name][part] = answer_losses(model, tokenizer, rows[part], side)

    questions = [question_key(row) for row in rows]
    weights, tokens = _resampling(questions, seed), losses["base"][:, 2]
    table = pd.DataFrame(rows, columns=["instruction", "input", "output", "fact"])
    table["output_tokens"] = tokens.astype(int)
    estimates = {}
    for name, given in answers.items():
        scores = _score(given, rows, losses[name])
        estimates[name] = _estimate(scores, tokens, weights)
        table[name] = [answer.text for answer in given]
        table[f"{name}_tokens"] = [answer.tokens for answer in given]
        table[f"{name}_stopped"] = [answer.stopped for answer in given]
        table[f"{name}_right"] = [bool(score) if row["fact"] else None for score, row in zip(scores["contains"], rows)]
        table[f"{name}_loss"] = scores["answer_loss"]
    estimates["change"] = estimates["tuned"] - estimates["base"]
    metrics = {"n": len(rows), "questions": len(set(questions)), "max_new_tokens": max_new_tokens}
    return metrics | {name: _side(estimate) for name, estimate in estimates.items()}, table


def answer_losses(model, tokenizer, rows: Sequence[dict], side: str = "tuned", batch_size: int = 16) -> np.ndarray:
    """Return for each row's expected answer, given its prompt: its loss in nats, the tokens guessed right, its tokens.

    The mask is the same whatever the recipe: the answer's tokens, without prompt and end-of-text token. What does not
    fit the model's positions is cut, first from the front of the prompt.

    Returns an array (rows, 3).
    """
    limit, eos = positions(model.config), tokenizer.eos_token_id
    prompts = encode([format_prompt(row["instruction"], row["input"]) for row in rows], tokenizer)
    answers = encode([format_answer(row["output"]) for row in rows], tokenizer, add_special_tokens=False)
    answers = [ids[: limit - 1] for ids in answers]
    ids = [prompt[-(limit - len(answer)) :] + answer for prompt, answer in zip(prompts, answers)]
    result = np.zeros((len(rows), 3))
    order = sorted(range(len(rows)), key=lambda index: len(ids[index]))
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        width = len(ids[chosen[-1]])
        # padded on the left, so that all answers end in the last column and only their logits are made
        tokens = torch.tensor([[eos] * (width - len(ids[i])) + ids[i] for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen], device=model.device)
        with only_forward(model, adapter_scalings(model), [side] * len(chosen)):
            output = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=max(len(answers[i]) for i in chosen) + 1,
            )
        for i, row, logits in zip(chosen, tokens, output.logits):
            length = len(answers[i])
            logits, target = logits[-length - 1 : -1].float(), row[len(row) - length :]
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            result[i] = float(loss), int((logits.argmax(-1) == target).sum()), length
    return result


def _score(answers: Sequence[Answer], rows: Sequence[dict], losses: np.ndarray) -> pd.DataFrame:
    """Return each row's score on each of `METRICS`; NaN where there is nothing to check."""
    scores = [
        {
            "contains": contains(answer.text, row["fact"]) if row["fact"] else None,
            "exact_match": exact_match(answer.text, row["output"]) if row["fact"] else None,
            "stop_rate": answer.stopped,
            "rouge_l": rouge_l(answer.text, row["output"]),
            "chrf": chrf(answer.text, row["output"]),
            "repetition": repetition(answer.text),
            "echo_rate": echoes(answer.text, row["instruction"]),
            "token_accuracy": right / tokens if tokens else None,
            "answer_loss": loss / tokens if tokens else None,
            "mean_answer_tokens": answer.tokens,
        }
        for answer, row, (loss, right, tokens) in zip(answers, rows, losses)
    ]
    return pd.DataFrame(scores, columns=list(METRICS), dtype=float)


def _resampling(questions: Sequence[str], seed: int) -> np.ndarray:
    """Return how often each row counts in each resample of the questions, (RESAMPLES + 1, rows); at first, once."""
    _, question = np.unique(np.array(questions), return_inverse=True)
    different = int(question.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(different, [1 / different] * different, size=RESAMPLES)
    return np.vstack([np.ones(len(questions)), drawn[:, question]])


def _estimate(scores: pd.DataFrame, tokens: np.ndarray, weights: np.ndarray) -> pd.DataFrame:
    """Return each metric on the rows and on each resample, (RESAMPLES + 1, metrics); NaN where no row counts."""
    counts = scores.notna().astype(float)
    counts[["token_accuracy", "answer_loss"]] *= tokens[:, None]  # a mean over tokens, not over rows
    estimates = (weights @ (scores.fillna(0) * counts)) / (weights @ counts)
    estimates["perplexity"] = np.exp(estimates["answer_loss"])
    return estimates


def _side(estimates: pd.DataFrame) -> dict:
    """Return values and intervals as `metrics.json` holds them."""
    values, ends = estimates.iloc[0].round(6), estimates.iloc[1:].quantile([0.025, 0.975]).round(6)
    measured = values.notna()
    intervals = {name: ends[name].tolist() if measured[name] else None for name in METRICS}
    return {name: float(values[name]) if measured[name] else None for name in METRICS} | {"intervals": intervals}


def verdict(metrics: dict, name: str) -> int:
    """Return 1 if tuning clearly made the metric better, -1 clearly worse, 0 if neither is clear.

    Clear: on at least `FEWEST_QUESTIONS` different questions the 95% interval of the change leaves out zero.
    """
    low, high = metrics["change"]["intervals"][name] or (0, 0)
    enough = metrics.get("questions", metrics["n"]) >= FEWEST_QUESTIONS  # an older run has no `questions`
    return METRICS[name].better * (int(low > 0) - int(high < 0)) if enough else 0


def main_metrics(metrics: Mapping) -> list[str]:
    """Return the five metrics to look at first; without facts to check, ROUGE-L and repetition stand for them."""
    content = ["rouge_l", "repetition"] if metrics["tuned"]["contains"] is None else ["contains", "exact_match"]
    return [*content, "stop_rate", "answer_loss", "mean_answer_tokens"]


def shown(metrics: Mapping, side: str, name: str) -> list[str]:
    """Return a side's value of a metric and the ends of its interval as text, with the decimals its change needs."""
    values = metrics[side][name], *metrics[side]["intervals"][name]
    change = metrics["change"][name]
    return [METRICS[name].show(value, signed=side == "change", change=change) for value in values]


def with_interval(metrics: Mapping, side: str, name: str) -> str:
    """Return a side's value of a metric with its interval in parentheses if that has any width; "–" if not measured."""
    if metrics[side][name] is None:
        return METRICS[name].show(None)
    value, low, high = shown(metrics, side, name)
    return value if value == low == high else f"{value} ({low} to {high})"


def comparison(metrics: dict, every: bool = False) -> pd.DataFrame:
    """Return the before/after table: base, tuned and change of each metric, with 95% intervals.

    Args:
        every: show all metrics that were measured, not only `main_metrics`.
    """
    lines: dict[str, dict[str, str]] = {}
    for name in METRICS if every else main_metrics(metrics):
        if metrics["change"][name] is not None:
            line = lines[METRICS[name].heading] = {
                side: with_interval(metrics, side, name) for side in ("base", "tuned", "change")
            }
            line[""] = {1: "better", -1: "worse", 0: ""}[verdict(metrics, name)]
    return pd.DataFrame.from_dict(lines, orient="index")


def conclusion(metrics: dict) -> str:
    """Return in a few short lines what the numbers say, whichever way they point; the first line is the verdict."""
    verdicts = {name: verdict(metrics, name) for name in JUDGED if metrics["change"][name] is not None}
    better, worse, same = ([name for name in verdicts if verdicts[name] == way] for way in (1, -1, 0))
    questions = metrics.get("questions", metrics["n"])
    counts = (
        f"On {questions} held-out questions {len(better)} of {len(verdicts)} measures got clearly better, "
        f"{len(worse)} clearly worse."
    )
    if questions < FEWEST_QUESTIONS:
        counts = f"There are {questions}, and a verdict takes at least {FEWEST_QUESTIONS}."
    openings = {
        "Too few held-out questions to tell.": questions < FEWEST_QUESTIONS,
        "Tuning helped in some ways and hurt in others.": better and worse,
        "Tuning lowered the loss alone, the answers themselves are not clearly better.": better == ["answer_loss"],
        "Tuning changed how the answers are written, but not clearly what they say.": better
        and not {"contains", "exact_match", "rouge_l"} & set(better),
        "Tuning helped.": better,
        "Tuning made the model worse.": worse,
        "Tuning made no clear difference.": True,
    }
    lines = [next(text for text, holds in openings.items() if holds), counts]
    for heading, names in (("Better:", better), ("Worse:", worse)):
        lines += [heading] if names else []
        for name in names:
            before, after = (shown(metrics, side, name)[0] for side in ("base", "tuned"))
            lines.append(f"  {METRICS[name].label}: {before} → {after}")
    if same and (better or worse):
        lines.append(f"No clear change: {', '.join(METRICS[name].label for name in same)}.")
    if metrics["tuned"]["stop_rate"] < 0.5:
        stops, *_ = shown(metrics, "tuned", "stop_rate")
        cut = f"the others are cut at {metrics['max_new_tokens']} tokens"
        lines.append(f"The tuned model stops by itself in {stops} of its answers; {cut}.")
    if metrics["base_bare"]["contains"] is not None:
        bare, templated = (shown(metrics, side, "contains")[0] for side in ("base_bare", "base"))
        lines.append(f"The template alone: the base holds the fact in {bare} without it, in {templated} with it.")
    return "\n".join(lines)
