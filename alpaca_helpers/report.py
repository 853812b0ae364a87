"""What the metrics of an evaluation say: the before/after table, and a conclusion in words."""

import textwrap
from collections.abc import Mapping

import pandas as pd

from .metrics import METRICS

FEWEST_QUESTIONS = 20  # with fewer no difference is called clear: a bootstrap of so few is too sure
# The metrics that the conclusion counts; the others repeat these, or are neither good nor bad.
JUDGED = ("contains", "exact_match", "rouge_l", "stop_rate", "repetition", "echo_rate", "answer_loss")


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
    """Return a table of base, tuned and change of `main_metrics`, or of `every` metric, with 95% intervals."""
    lines: dict[str, dict[str, str]] = {}
    for name in METRICS if every else main_metrics(metrics):
        if metrics["change"][name] is not None:
            line = {side: with_interval(metrics, side, name) for side in ("base", "tuned", "change")}
            lines[METRICS[name].heading] = line | {"": ("", "better", "worse")[verdict(metrics, name)]}
    return pd.DataFrame.from_dict(lines, orient="index")


def conclusion(metrics: dict) -> str:
    """Return in a few lines of at most 100 characters what the numbers say, better or worse; first the verdict."""
    verdicts = {name: verdict(metrics, name) for name in JUDGED if metrics["change"][name] is not None}
    better, worse, same = ([name for name in verdicts if verdicts[name] == way] for way in (1, -1, 0))
    questions = metrics.get("questions", metrics["n"])
    if questions < FEWEST_QUESTIONS:
        lines = ["Too few held-out questions to tell."]
        lines.append(f"There are {questions}, and a verdict takes at least {FEWEST_QUESTIONS}.")
    else:
        counts = f"{len(better)} of {len(verdicts)} measures got clearly better, {len(worse)} clearly worse"
        lines = [_opening(better, worse), f"On {questions} held-out questions {counts}."]
    for heading, names in (("Better:", better), ("Worse:", worse)):
        lines += [heading] if names else []
        for name in names:
            before, after = (shown(metrics, side, name)[0] for side in ("base", "tuned"))
            lines.append(f"  {METRICS[name].label}: {before} → {after}")
    if same and (better or worse):
        lines.append(f"No clear change: {', '.join(METRICS[name].label for name in same)}.")
    stop_rate = metrics["tuned"]["stop_rate"]
    if stop_rate < 0.5:
        share, others = shown(metrics, "tuned", "stop_rate")[0], "the others are" if stop_rate else "all are"
        cut = f"{others} cut at {metrics['max_new_tokens']} tokens"
        lines.append(f"The tuned model stops by itself in {share} of its answers; {cut}.")
    if metrics["base_bare"]["contains"] is not None:
        bare, templated = (shown(metrics, side, "contains")[0] for side in ("base_bare", "base"))
        lines.append(f"The template alone: the base holds the fact in {bare} without it, in {templated} with it.")
    return "\n".join(textwrap.fill(line, 100, break_on_hyphens=False) for line in lines)


def _opening(better: list[str], worse: list[str]) -> str:
    """Return the verdict on tuning, from the metrics that got clearly better and worse."""
    if better and worse:
        return "Tuning helped in some ways and hurt in others."
    if worse:
        return "Tuning made the model worse."
    if not better:
        return "Tuning made no clear difference."
    if better == ["answer_loss"]:
        return "Tuning lowered the loss alone, the answers themselves are not clearly better."
    if not {"contains", "exact_match", "rouge_l"} & set(better):
        return "Tuning changed how the answers are written, but not clearly what they say."
    return "Tuning helped."
