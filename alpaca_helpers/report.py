"""What the metrics of an evaluation say: the before/after table, and a conclusion in words."""

from collections.abc import Mapping

import pandas as pd

from .metrics import METRICS

FEWEST_QUESTIONS = 20  # below it no difference is called clear: the bootstrap of a few promises too much
# What the conclusion rests on; the others say the same again, or neither good nor bad.
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
        those = "the others are" if metrics["tuned"]["stop_rate"] else "all are"
        cut = f"{those} cut at {metrics['max_new_tokens']} tokens"
        lines.append(f"The tuned model stops by itself in {stops} of its answers; {cut}.")
    if metrics["base_bare"]["contains"] is not None:
        bare, templated = (shown(metrics, side, "contains")[0] for side in ("base_bare", "base"))
        lines.append(f"The template alone: the base holds the fact in {bare} without it, in {templated} with it.")
    return "\n".join(lines)
