"""What the metrics of an evaluation say: the before/after table, and a conclusion in words."""

from collections.abc import Mapping
from functools import partial

import pandas as pd

from .metrics import METRICS

FEWEST_QUESTIONS = 20  # with fewer no difference is called clear: a bootstrap of so few is too sure
# The metrics that the conclusion counts; the others repeat these, or are neither good nor bad.
JUDGED = ("contains", "exact_match", "rouge_l", "stop_rate", "repetition", "echo_rate", "answer_loss")


def verdict(metrics: Mapping, name: str) -> int:
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


def shown(metrics: Mapping, side: str, name: str, interval: bool = True) -> str:
    """Return a side's value of a metric as text, with its interval in parentheses if that has any width."""
    numbers = [metrics[side][name], *(metrics[side]["intervals"][name] or ())]
    change = metrics["change"][name]
    value, *ends = (METRICS[name].show(number, signed=side == "change", change=change) for number in numbers)
    return f"{value} ({' to '.join(ends)})" if interval and {*ends} - {value} else value


def comparison(metrics: Mapping, every: bool = False) -> pd.DataFrame:
    """Return a table of base, tuned and change of `main_metrics`, or of `every` metric, with 95% intervals."""
    names = [name for name in (METRICS if every else main_metrics(metrics)) if metrics["change"][name] is not None]
    columns = {side: [shown(metrics, side, name) for name in names] for side in ("base", "tuned", "change")}
    columns[""] = [("", "better", "worse")[verdict(metrics, name)] for name in names]
    return pd.DataFrame(columns, index=[METRICS[name].heading for name in names])


def conclusion(metrics: Mapping) -> str:
    """Return in a few lines what the numbers say, better or worse; the first is the verdict."""
    said = partial(shown, metrics, interval=False)
    judged = [name for name in JUDGED if metrics["change"][name] is not None]
    better, worse, same = ([name for name in judged if verdict(metrics, name) == way] for way in (1, -1, 0))
    opening = {
        (False, False): "Tuning made no clear difference.",
        (True, False): "Tuning helped.",
        (False, True): "Tuning made the model worse.",
        (True, True): "Tuning helped in some ways and hurt in others.",
    }[bool(better), bool(worse)]
    if better and not worse and not {"contains", "exact_match", "rouge_l"} & set(better):
        opening = "Tuning helped, but what the answers say is not clearly better."
    questions = metrics.get("questions", metrics["n"])
    if questions < FEWEST_QUESTIONS:
        opening = f"Too few held-out questions to tell: a verdict takes at least {FEWEST_QUESTIONS}."
    counts = f"{len(better)} of {len(judged)} measures got clearly better, {len(worse)} clearly worse"
    lines = [opening, f"On {questions} held-out questions {counts}."]
    for heading, names in {"Better:": better, "Worse:": worse, "No clear change:": same}.items():
        if names:
            changes = [f"  {METRICS[name].label}: {said('base', name)} → {said('tuned', name)}" for name in names]
            lines += [heading, *changes]
    if metrics["tuned"]["stop_rate"] < 0.5:
        cut = f"the others are cut at {metrics['max_new_tokens']} tokens"
        lines.append(f"The tuned model stops by itself in {said('tuned', 'stop_rate')} of its answers; {cut}.")
    if metrics["base_bare"]["contains"] is not None:
        bare, templated = said("base_bare", "contains"), said("base", "contains")
        lines.append(f"The template alone: the base holds the fact in {bare} without it, in {templated} with it.")
    return "\n".join(lines)
