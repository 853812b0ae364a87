"""Held-out metrics, base against tuned: same rows, same prompt, greedy, in batches, one model."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import AlpacaError
from .data import question_key
from .generation import Answer, adapter_scalings, generate, only_forward
from .metrics import METRICS, chrf, contains, echoes, exact_match, repetition, rouge_l
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
        answers: a row a held-out row: its text, each side's answer, tokens, whether it stopped and whether it is right.

    Raises AlpacaError if there are no rows.
    """
    rows = list(rows)
    if not rows:
        raise AlpacaError(
            "There are no held-out rows to evaluate: run notebook 02 again, with more `heldout_rows`.", "no-rows"
        )
    templated = [format_prompt(row["instruction"], row["input"]) for row in rows]
    bare = [" ".join(filter(None, (row["instruction"], row["input"]))) for row in rows]
    asked = {"base": ("base", templated), "tuned": ("tuned", templated), "base_bare": ("base", bare)}
    weights = _resampling([question_key(row) for row in rows], seed)
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
    estimates["change"] = {
        name: tuned - estimates["base"][name] if tuned is not None else None
        for name, tuned in estimates["tuned"].items()
    }
    head = {"n": len(rows), "questions": len(set(map(question_key, rows))), "max_new_tokens": max_new_tokens}
    return head | {name: _side(estimate) for name, estimate in estimates.items()}, pd.DataFrame(table)


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
    positions = model.config.max_position_embeddings
    answers = [answer[: positions - 1] for answer in answers]
    ids = [prompt[-(positions - len(answer)) :] + answer for prompt, answer in zip(prompts, answers)]
    width, longest = max(map(len, ids)), max(map(len, answers))
    result = np.zeros((len(ids), 3))
    if not longest:
        return result
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
    for row, (answer, logits) in enumerate(zip(answers, output.logits)):
        if answer:
            logits, target = logits[-len(answer) - 1 : -1].float(), tokens[row, -len(answer) :]
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            result[row] = float(loss), int((logits.argmax(-1) == target).sum()), len(answer)
    return result


def _score(answers: Sequence[Answer], rows: Sequence[dict]) -> dict[str, np.ndarray]:
    """Return for each metric of answers what each row adds above and below its fraction, (rows, 2)."""
    pairs = list(zip(answers, rows))
    scores: dict[str, list] = {
        "contains": [contains(a.text, r["fact"]) for a, r in pairs],
        "exact_match": [bool(r["fact"]) and exact_match(a.text, r["output"]) for a, r in pairs],
        "stop_rate": [a.stopped for a, _ in pairs],
        "rouge_l": [rouge_l(a.text, r["output"]) for a, r in pairs],
        "chrf": [chrf(a.text, r["output"]) for a, r in pairs],
        "repetition": [repetition(a.text) for a, _ in pairs],
        "echo_rate": [echoes(a.text, r["instruction"]) for a, r in pairs],
        "mean_answer_tokens": [a.tokens for a, _ in pairs],
    }
    counted = {name: [bool(row["fact"]) for row in rows] for name in ("contains", "exact_match")}
    everywhere = [True] * len(rows)
    return {name: np.array([above, counted.get(name, everywhere)], float).T for name, above in scores.items()}


def _resampling(questions: Sequence[str], seed: int) -> np.ndarray:
    """Return how often each row counts in each resample of the questions, (RESAMPLES + 1, rows); at first, once each.

    Args:
        questions: each row's; rows with the same one are drawn together.
    """
    _, question = np.unique(np.array(questions), return_inverse=True)
    different = int(question.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(different, [1 / different] * different, size=RESAMPLES)
    return np.vstack([np.ones(len(questions)), drawn[:, question]])


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

    Clear: on at least `FEWEST_QUESTIONS` different questions the 95% interval of the change leaves out zero.
    """
    interval = metrics["change"]["intervals"][name]
    if interval is None or _questions(metrics) < FEWEST_QUESTIONS:
        return 0
    low, high = interval
    return METRICS[name].better * (int(low > 0) - int(high < 0))


def _questions(metrics: dict) -> int:
    return metrics.get("questions", metrics["n"])  # an older run's rows were taken for different questions


def main_metrics(metrics: Mapping) -> list[str]:
    """Return the five metrics to look at first; without facts to check, ROUGE-L and repetition stand for them."""
    content = ["rouge_l", "repetition"] if metrics["tuned"]["contains"] is None else ["contains", "exact_match"]
    return [*content, "stop_rate", "answer_loss", "mean_answer_tokens"]


def comparison(metrics: dict, every: bool = False) -> pd.DataFrame:
    """Return the before/after table: base, tuned and change of each metric, with 95% intervals.

    Args:
        every: show all metrics that were measured, not only `main_metrics`.
    """
    lines = {}
    for name in METRICS if every else main_metrics(metrics):
        if metrics["change"][name] is None:
            continue
        metric = METRICS[name]
        lines[metric.label + (f", {metric.unit}" if len(metric.unit) > 1 else "")] = {
            side: _with_interval(metrics, side, name) for side in ("base", "tuned", "change")
        } | {"": {1: "better", -1: "worse", 0: ""}[verdict(metrics, name)]}
    return pd.DataFrame.from_dict(lines, orient="index")


def _with_interval(metrics: dict, side: str, name: str) -> str:
    value, low, high = (
        METRICS[name].show(value, signed=side == "change", change=metrics["change"][name])
        for value in (metrics[side][name], *metrics[side]["intervals"][name])
    )
    return value if low == value == high else f"{value} ({low} to {high})"


def conclusion(metrics: dict) -> str:
    """Return in a few short lines what the numbers say, whichever way they point; the first line is the verdict."""
    verdicts = {name: verdict(metrics, name) for name in JUDGED if metrics["change"][name] is not None}
    better, worse, same = ([name for name in verdicts if verdicts[name] == way] for way in (1, -1, 0))
    questions, share = _questions(metrics), METRICS["contains"].show
    counts = (
        f"On {questions} held-out questions {len(better)} of {len(verdicts)} measures got clearly better, "
        f"{len(worse)} clearly worse."
    )
    if questions < FEWEST_QUESTIONS:
        opening = "Too few held-out questions to tell."
        counts = f"There are {questions}, and a verdict takes at least {FEWEST_QUESTIONS}."
    elif better and worse:
        opening = "Tuning helped in some ways and hurt in others."
    elif better == ["answer_loss"]:
        opening = "Tuning lowered the loss alone, the answers themselves are not clearly better."
    elif better and not {"contains", "exact_match", "rouge_l"} & set(better):
        opening = "Tuning changed how the answers are written, but not clearly what they say."
    elif better:
        opening = "Tuning helped."
    elif worse:
        opening = "Tuning made the model worse."
    else:
        opening = "Tuning made no clear difference."
    lines = [opening, counts]
    for heading, names in (("Better:", better), ("Worse:", worse)):
        if names:
            lines += [heading, *(f"  {_before_after(metrics, name)}" for name in names)]
    if same and (better or worse):
        lines.append(f"No clear change: {', '.join(METRICS[name].label for name in same)}.")
    if metrics["tuned"]["stop_rate"] < 0.5:
        stops = METRICS["stop_rate"].show(metrics["tuned"]["stop_rate"])
        limit = metrics["max_new_tokens"]
        lines.append(
            f"The tuned model stops by itself in {stops} of its answers; the others are cut at {limit} tokens."
        )
    if (bare := metrics["base_bare"]["contains"]) is not None:
        templated = share(metrics["base"]["contains"])
        lines.append(
            f"The template alone: the base holds the fact in {share(bare)} without it, in {templated} with it."
        )
    return "\n".join(lines)


def _before_after(metrics: dict, name: str) -> str:
    metric, change = METRICS[name], metrics["change"][name]
    before, after = (metric.show(metrics[side][name], change=change) for side in ("base", "tuned"))
    return f"{metric.label}: {before} → {after}"
