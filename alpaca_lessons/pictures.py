"""Pictures of the training and of the comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from alpaca_helpers.metrics import METRICS
from alpaca_helpers.prompts import format_prompt
from alpaca_helpers.report import main_metrics, shown
from alpaca_lessons.plots import BASE, BLUE, INK, ORANGE, PALE, TUNED, in_style, save_picture

BARE = {"facecolor": "white", "edgecolor": INK, "hatch": "...", "linewidth": 0.8}
SIDES = {"base_bare": ("base, bare question", BARE), "base": ("base", BASE), "tuned": ("tuned", TUNED)}


@in_style
def losses(log_history: Sequence[Mapping[str, float]], base_loss: float, path: Path) -> Image:
    """Draw train and held-out loss over the steps, on a logarithmic axis; return the picture saved to `path`.

    The `loss` in `trainer.state.log_history` is the mean over the steps since the last line of the log, so it is drawn
    as a level over these steps. `base_loss` is the `eval_loss` before training, in nats per learned token.
    """
    log = pd.DataFrame(log_history, columns=["step", "loss", "eval_loss"], dtype=float).set_index("step")
    train = log["loss"].dropna()
    heldout = pd.concat([pd.Series({0: base_loss}), log["eval_loss"].dropna()])  # a new adapter changes nothing
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(base_loss, color=INK, linestyle="--", label=f"base model, held-out rows: {base_loss:.2f}")
    label = "training rows, mean since the previous log line"
    axes.stairs(train, [0, *train.index], baseline=None, color=BLUE, linewidth=1.6, label=label)
    axes.plot(heldout, "s-", color=ORANGE, markeredgecolor=INK, clip_on=False, label="held-out rows, at that step")
    axes.set(title="Loss while training", xlabel="optimizer steps", ylabel="loss (nats per token)", yscale="log")
    axes.set_xlim(0, max([1, *log.index]))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    lines = {"training": train, "held-out": heldout}
    said = [f"{name} from {line.iloc[0]:.3g} to {line.iloc[-1]:.3g}" for name, line in lines.items() if len(line)]
    return save_picture(figure, path, f"Loss over the steps: {', '.join(said)}")


@in_style
def next_tokens(tokenizer, answer_ids: Sequence[int], probabilities: Mapping[str, torch.Tensor], path: Path) -> Image:
    """Draw each side's likeliest tokens after a prompt, and how likely it finds the end along a right answer.

    Return the picture saved to `path`. `probabilities` holds for each side (`base`, `tuned`) those of the next token
    after the prompt and after each token of the answer, (answer's tokens + 1, vocabulary).
    """
    figure, end = Figure(figsize=(7.5, 5.5), layout="constrained"), tokenizer.eos_token_id
    panels = figure.subplot_mosaic([list(probabilities), ["end"] * len(probabilities)])
    looks, markers = {"base": BASE, "tuned": TUNED}, {"base": "o-", "tuned": "s-"}
    for side, after in probabilities.items():
        top = after[0].topk(10)
        panels[side].barh(range(10), top.values.tolist(), **looks[side])
        panels[side].set_yticks(range(10), [repr(tokenizer.decode(id)) for id in top.indices], parse_math=False)
        panels[side].set(title=f"{side} model", xlabel="probability of being next", xlim=(0, 1), ylim=(9.6, -0.6))
        line = {"color": looks[side]["facecolor"], "markeredgecolor": INK, "linewidth": 1.6}
        panels["end"].plot(after[:, end], markers[side], label=f"{side} model", **line)
    tokens = [format_prompt("").splitlines()[-1], *(repr(tokenizer.decode(id)) for id in answer_ids)]
    panels["end"].set_xticks(range(len(tokens)), tokens, parse_math=False)
    panels["end"].set(xlabel="after this token of a right answer", ylabel="probability of the end", ylim=(-0.05, 1.05))
    panels["end"].legend()
    ends = {side: f"{after[-1, end]:.2f}" for side, after in probabilities.items()}
    alt = f"The likeliest tokens after the prompt, by side; the end after the whole answer: {ends}"
    return save_picture(figure, path, alt)


@in_style
def before_after(metrics: Mapping, path: Path) -> Image:
    """Draw the metrics of `comparison` as bars with 95% intervals; return the picture saved to `path`."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplot_mosaic([["shares", "answer_loss"], ["shares", "mean_answer_tokens"]], width_ratios=[2, 1])
    names = main_metrics(metrics)
    _bars(panels["shares"], metrics, [name for name in names if METRICS[name].unit == "%"])
    panels["shares"].set(title=f"Base against tuned, {metrics['n']} held-out rows", xlabel="share (%)", xlim=(0, 115))
    for name in ("answer_loss", "mean_answer_tokens"):
        _bars(panels[name], metrics, [name])
        panels[name].set(xlabel=f"{METRICS[name].label} ({METRICS[name].unit})", yticks=[])
        panels[name].margins(x=0.25)
    figure.legend(*panels["shares"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    before, after = ({name: shown(metrics, side, name, interval=False) for name in names} for side in ("base", "tuned"))
    said = [f"{METRICS[name].label} {before[name]} to {after[name]}" for name in names]
    return save_picture(figure, path, f"Bars with 95% intervals, base to tuned: {', '.join(said)}")


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
        axes.bar_label(bars, [shown(metrics, side, name, interval=False) for name in names], padding=4, size=8.5)
    labels = [METRICS[name].label + "\n(less is better)" * (METRICS[name].better < 0) for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()


@in_style
def answer_lengths(answers: pd.DataFrame, max_new_tokens: int, path: Path) -> Image:
    """Draw how many tokens `evaluate`'s answers and the expected ones have; return the picture saved to `path`."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    panels = figure.subplots(3, sharex=True)
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
    said = "; ".join(axes.get_title("left") for axes in panels)
    return save_picture(figure, path, f"Histograms of answer lengths. {said}")
