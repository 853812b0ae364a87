"""Metrics of base and tuned model on the same held-out rows: same prompt, greedy answers, one model."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import AlpacaError
from .data import question_key
from .generation import Answer, adapter_scalings, generate, only_forward, padded_left
from .metrics import METRICS, chrf, contains, echoes, exact_match, repetition, rouge_l
from .models import positions
from .prompts import encode, format_answer, format_prompt

RESAMPLES = 2000  # of the bootstrap


def evaluate(
    model, tokenizer, rows: Iterable[dict], max_new_tokens: int = 80, seed: int = 0
) -> tuple[dict, pd.DataFrame]:
    """Return the metrics of base and tuned model on the same held-out rows, and a table of their answers.

    The prompt is `format_prompt(instruction, input)` for every recipe, so that numbers compare; `base_bare` is the base
    asked without the template. The answers are greedy, and cut at `max_new_tokens`; `seed` is the bootstrap's.

    The metrics are `n` (rows), `questions` (different ones), `max_new_tokens`, and the sides `base`, `tuned`,
    `base_bare` and `change` (tuned minus base). Each has the keys of `METRICS`, None where no row has anything to
    check, and under `intervals` a 95% bootstrap interval for each. Shares are of 1; `answer_loss` is in nats per answer
    token, the end-of-text token left out; `base_bare` has no loss.

    The table has for each row its text; each side's answer, token ids and their number, whether it stopped and whether
    it is right; and the loss of the expected answer. AlpacaError is raised if there are no rows.
    """
    rows = [{"input": "", "fact": ""} | row for row in rows]
    if not rows:
        raise AlpacaError("There are no held-out rows: run notebook 02 again, with more `heldout_rows`.")
    templated = [format_prompt(row["instruction"], row["input"]) for row in rows]
    bare = [" ".join(filter(None, (row["instruction"], row["input"]))) for row in rows]
    asked = {"base": ("base", templated), "tuned": ("tuned", templated), "base_bare": ("base", bare)}
    questions = pd.Series([question_key(row) for row in rows])
    table = pd.DataFrame(rows, columns=["instruction", "input", "output", "fact"])
    estimates = {}
    for name, (side, prompts) in tqdm(asked.items(), desc="evaluating", unit="side"):
        answers = generate(model, tokenizer, prompts, side=side, max_new_tokens=max_new_tokens)
        scores = pd.DataFrame(map(_scores, answers, rows), columns=list(METRICS), dtype=float)
        if prompts is templated:
            losses = pd.DataFrame(answer_losses(model, tokenizer, rows, side), columns=["nats", "right", "tokens"])
            table["output_tokens"] = losses["tokens"].astype(int)
            scores[["answer_loss", "token_accuracy"]] = losses[["nats", "right"]].div(losses["tokens"], axis=0)
        estimates[name] = _estimate(scores, table["output_tokens"], questions, seed)
        table[name] = [answer.text for answer in answers]
        for part in ("ids", "tokens", "stopped"):
            table[f"{name}_{part}"] = [getattr(answer, part) for answer in answers]
        table[f"{name}_right"] = [bool(score) if row["fact"] else None for score, row in zip(scores["contains"], rows)]
        table[f"{name}_loss"] = scores["answer_loss"]
    estimates["change"] = estimates["tuned"] - estimates["base"]
    metrics = {"n": len(rows), "questions": questions.nunique(), "max_new_tokens": max_new_tokens}
    return metrics | {name: _side(estimate) for name, estimate in estimates.items()}, table


def answer_losses(model, tokenizer, rows: Sequence[dict], side: str = "tuned", batch_size: int = 16) -> np.ndarray:
    """Return for each row's expected answer its loss in nats, the tokens guessed right and its tokens, (rows, 3).

    The mask is the same whatever the recipe: the answer's tokens, without prompt and end-of-text token. What does not
    fit the model's positions is cut, first from the front of the prompt.
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
        batch = padded_left([ids[i] for i in chosen], eos, model.device)  # so that all answers end in the last column
        longest = max(len(answers[i]) for i in chosen)  # and only their logits are made
        with only_forward(model, adapter_scalings(model), [side] * len(chosen)):
            output = model(**batch, use_cache=False, logits_to_keep=longest + 1)
        for i, row, scores in zip(chosen, batch["input_ids"], output.logits):
            length = len(answers[i])
            logits, target = scores[-length - 1 : -1].float(), row[len(row) - length :]
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            result[i] = float(loss), int((logits.argmax(-1) == target).sum()), length
    return result


def _scores(answer: Answer, row: dict) -> dict:
    """Return the answer's scores; those of `METRICS` that are missing are the loss's."""
    scores = {
        "stop_rate": answer.stopped,
        "rouge_l": rouge_l(answer.text, row["output"]),
        "chrf": chrf(answer.text, row["output"]),
        "repetition": repetition(answer.text),
        "echo_rate": echoes(answer.text, row["instruction"]),
        "mean_answer_tokens": answer.tokens,
    }
    if row["fact"]:
        scores["contains"] = contains(answer.text, row["fact"])
        scores["exact_match"] = exact_match(answer.text, row["output"])
    return scores


def _estimate(scores: pd.DataFrame, tokens: pd.Series, questions: pd.Series, seed: int) -> pd.DataFrame:
    """Return the metrics on all rows (the first line) and on each resample of the questions; NaN where no row counts.

    It is questions that are resampled, since rows that ask the same one tell less than different ones.
    """
    weights = scores.notna().astype(float)
    for name in ("token_accuracy", "answer_loss"):
        weights[name] *= tokens  # a mean over tokens, not over rows
    sums, weights = (part.groupby(questions).sum() for part in (scores.fillna(0) * weights, weights))
    count = len(sums)
    drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES)
    drawn = np.vstack([np.ones(count), drawn])
    estimates = (drawn @ sums) / (drawn @ weights)
    estimates["perplexity"] = np.exp(estimates["answer_loss"])
    return estimates


def _side(estimates: pd.DataFrame) -> dict:
    """Return values and intervals as `metrics.json` holds them."""
    ends = estimates.iloc[1:].quantile([0.025, 0.975]).round(6)
    values = {name: None if pd.isna(value) else round(value, 6) for name, value in estimates.iloc[0].to_dict().items()}
    intervals = {name: None if value is None else ends[name].tolist() for name, value in values.items()}
    return values | {"intervals": intervals}
