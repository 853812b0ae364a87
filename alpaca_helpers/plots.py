"""The pictures of training and of the comparison: each function returns a `Picture`."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from .metrics import METRICS
from .picture import BARE, BASE, BLUE, INK, ORANGE, PALE, TUNED, Picture, in_style
from .prompts import format_prompt
from .report import main_metrics, shown

SIDES = {"base_bare": ("base, bare question", BARE), "base": ("base", BASE), "tuned": ("tuned", TUNED)}


@in_style
def losses(log_history: Sequence[Mapping[str, float]], base_loss: float | None = None) -> Picture:
    """Return train and held-out loss over the steps, on a logarithmic axis.

    The `loss` in `trainer.state.log_history` is the mean over the steps since the last line of the log, so it is drawn
    as a level over these steps. `base_loss` is the `eval_loss` before training, in nats per learned token.
    """
    log = pd.DataFrame(log_history, columns=["step", "loss", "eval_loss"], dtype=float)
    train, heldout = (log.set_index("step")[name].dropna() for name in ("loss", "eval_loss"))
    picture = Picture(figsize=(7.5, 3.6), layout="constrained")
    axes = picture.subplots()
    if base_loss is not None:
        heldout = pd.concat([pd.Series({0: base_loss}), heldout])  # a new adapter changes nothing
        axes.axhline(base_loss, color=INK, linestyle="--", label=f"base model, held-out rows: {base_loss:.2f}")
    label = "training rows, mean since the previous log line"
    axes.stairs(train, [0, *train.index], baseline=None, color=BLUE, linewidth=1.6, label=label)
    axes.plot(heldout, "s-", color=ORANGE, markeredgecolor=INK, clip_on=False, label="held-out rows, at that step")
    axes.set(title="Loss while training", ylabel="loss (nats per token)")
    if max([0, *train, *heldout]) > 0:
        axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if 0 < 5 * low < high else MaxNLocator(5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    axes.set(xlabel="optimizer steps", xlim=(0, max([1, *log["step"]])))
    picture.legend(loc="outside lower center", ncols=2)
    ends = {"training": train, "held-out": heldout}
    said = [f"{name} from {line.iloc[0]:.3g} to {line.iloc[-1]:.3g}" for name, line in ends.items() if len(line)]
    picture.alt = f"Loss over the steps: {', '.join(said) or 'none'}"
    return picture


@in_style
def next_tokens(tokenizer, answer_ids: Sequence[int], probabilities: Mapping[str, torch.Tensor]) -> Picture:
    """Return each side's likeliest tokens after a prompt, and how likely it finds the end along a right answer.

    `probabilities` holds for each side (`base`, `tuned`) those of the next token after the prompt and after each token
    of the answer, (answer's tokens + 1, vocabulary).
    """
    picture, asked = Picture(figsize=(7.5, 5.5), layout="constrained"), format_prompt("").splitlines()[-1]
    axes = picture.subplot_mosaic([list(probabilities), ["end"] * len(probabilities)])
    looks, end = {"base": BASE, "tuned": TUNED}, tokenizer.eos_token_id
    for side, said in probabilities.items():
        top = said[0].topk(10)
        axes[side].barh(range(10), top.values, **looks[side])
        axes[side].set_yticks(range(10), [_as_text(tokenizer, id) for id in top.indices])
        axes[side].set(title=f"{side} model", xlabel="probability of being next", xlim=(0, 1), ylim=(9.6, -0.6))
        line = {"color": looks[side]["facecolor"], "markeredgecolor": INK, "linewidth": 1.6}
        axes["end"].plot(said[:, end], "os"[side == "tuned"] + "-", label=f"{side} model", **line)
    axes["end"].set_xticks(range(len(answer_ids) + 1), [asked, *(_as_text(tokenizer, id) for id in answer_ids)])
    axes["end"].set(xlabel="after this token of a right answer", ylabel="probability of the end", ylim=(-0.05, 1.05))
    axes["end"].legend()
    ends = {side: f"{said[-1, end]:.2f}" for side, said in probabilities.items()}
    picture.alt = f"The likeliest tokens after the prompt, by side; the end after the whole answer: {ends}"
    return picture


def _as_text(tokenizer, id) -> str:
    return repr(tokenizer.decode([int(id)])).replace("$", r"\$")


@in_style
def before_after(metrics: Mapping) -> Picture:
    """Return the metrics of `comparison` as bars with 95% intervals, base and tuned."""
    picture = Picture(figsize=(9, 3.6), layout="constrained")
    panels = picture.subplot_mosaic([["shares", "answer_loss"], ["shares", "mean_answer_tokens"]], width_ratios=[2, 1])
    names = main_metrics(metrics)
    _bars(panels["shares"], metrics, [name for name in names if METRICS[name].unit == "%"])
    panels["shares"].set(title=f"Base against tuned, {metrics['n']} held-out rows", xlabel="share (%)", xlim=(0, 115))
    for name in ("answer_loss", "mean_answer_tokens"):
        _bars(panels[name], metrics, [name])
        panels[name].set(xlabel=f"{METRICS[name].label} ({METRICS[name].unit})", yticks=[])
        panels[name].margins(x=0.25)
    picture.legend(*panels["shares"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    before, after = ({name: shown(metrics, side, name)[0] for name in names} for side in ("base", "tuned"))
    said = [f"{METRICS[name].label} {before[name]} to {after[name]}" for name in names]
    picture.alt = f"Bars with 95% intervals, base to tuned: {', '.join(said)}"
    return picture


def _bars(axes, metrics: Mapping, names: Sequence[str]) -> None:
    """Draw a group of bars for each metric, a bar for each side that has it."""
    scale = 100 if METRICS[names[0]].unit == "%" else 1
    for place, (side, (label, look)) in enumerate(SIDES.items()):
        if metrics[side][names[0]] is None:
            continue
        values = scale * np.array([metrics[side][name] for name in names])
        low, high = scale * np.array([metrics[side]["intervals"][name] for name in names]).T
        ends = np.maximum(0, [values - low, high - values])
        y = np.arange(len(names)) + 0.27 * (place - 1)
        bars = axes.barh(y, values, 0.25, xerr=ends, capsize=2.5, ecolor=INK, label=label, **look)
        axes.bar_label(bars, [shown(metrics, side, name)[0] for name in names], padding=4, size=8.5)
    labels = [METRICS[name].label + "\n(less is better)" * (METRICS[name].better < 0) for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()


@in_style
def answer_lengths(answers: pd.DataFrame, max_new_tokens: int = 80) -> Picture:
    """Return how long `evaluate`'s answers of base and tuned model and the expected ones are, in tokens."""
    picture = Picture(figsize=(7.5, 4.2), layout="constrained")
    panels = picture.subplots(3, sharex=True)
    longest = max(max_new_tokens, answers["output_tokens"].max())
    bins = np.arange(-0.5, longest + 3, max(1, round(longest / 40)))
    labels = ["stopped by itself", f"cut at {max_new_tokens} tokens"]
    names = {"base": "base model", "tuned": "tuned model", "output": "expected answers"}
    for axes, (side, name) in zip(panels, names.items()):
        lengths = answers[f"{side}_tokens"]
        stopped = answers.get(f"{side}_stopped", pd.Series(True, answers.index)).astype(bool)
        look = {"color": [BLUE, PALE], "edgecolor": INK, "linewidth": 0.8}
        axes.hist([lengths[stopped], lengths[~stopped]], bins, stacked=True, label=labels, **look)
        axes.set_title(f"{name}: mean {lengths.mean():.1f} tokens, {1 - stopped.mean():.0%} cut", size=10)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    panels[0].legend(loc="upper left")
    panels[2].set_xlabel("answer (tokens)")
    panels[1].set_ylabel("answers")
    picture.alt = f"Histograms of answer lengths. {'; '.join(axes.get_title('left') for axes in panels)}"
    return picture


def answers_table(answers: pd.DataFrame, rows: int = 8, letters: int = 160) -> HTML:
    """Return answers side by side as a table, evenly spread over the rows: question, expected, base, tuned.

    ✓ and ✗ tell whether an answer holds the fact; … ends an answer that did not stop, or is longer than `letters`.
    """

    def line(text: str, stopped: bool = True, right: bool | None = None) -> str:
        text = " ".join(text.split())
        mark = "" if pd.isna(right) else "✓ " if right else "✗ "
        return mark + text[:letters].rstrip() + ("" if stopped and len(text) <= letters else " …")

    chosen = answers.iloc[np.unique(np.linspace(0, len(answers) - 1, rows).round().astype(int))]
    table = {
        "question": map(line, chosen["instruction"] + " " + chosen["input"]),
        "expected": map(line, chosen["output"]),
    }
    for side in ("base", "tuned"):
        table[side] = map(line, chosen[side], chosen[f"{side}_stopped"], chosen[f"{side}_right"])
    # text of a user or a model: escaped, and no $…$ in it is taken for a formula
    with pd.option_context("display.max_colwidth", None, "display.html.use_mathjax", False):
        return HTML(pd.DataFrame(table).to_html(index=False, justify="left", border=0))
