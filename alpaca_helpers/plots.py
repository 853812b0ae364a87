"""The pictures of the series: each function returns a `Picture`."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from .evaluation import main_metrics
from .metrics import METRICS
from .picture import BARE, BASE, BLUE, EXPECTED, INK, ORANGE, PAPER, TUNED, figure, in_style
from .picture import Picture as Picture
from .token_boxes import tokens as tokens


@in_style
def word_counts(words: Sequence[int], max_words: int) -> Picture:
    """Return how many answers have how many words, and how many are too long and so dropped.

    Each bar but the last spans twice as many words as the one before, up to `max_words`: short and long answers show.
    """
    ends = [max_words]
    while ends[0] > 5 and len(ends) < 6:
        ends.insert(0, ends[0] // 2)
    counts = np.histogram(words, [0, *(end + 1 for end in ends), np.inf])[0]
    starts = [end + 1 for end in ends]
    labels = [f"up to {ends[0]}", *(f"{low}–{high}" for low, high in zip(starts, ends[1:])), f"over {max_words}"]
    picture, (axes,) = figure(7.5, 3)
    bars = axes.bar(labels, counts, 0.8, **TUNED)
    bars[-1].update(BASE)
    axes.bar_label(bars, [f"{count:,}" for count in counts[:-1]] + [f"{counts[-1]:,} rows\nare dropped"], padding=2)
    axes.margins(y=0.2)
    median = f"half have at most {int(np.median(words))}"
    axes.set(title=f"How long the {len(words):,} answers are: {median} words", ylabel="rows")
    axes.set_xlabel("answer (words; a bar spans twice as many as the one before)")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    said = ", ".join(f"{label} words {count:,}" for label, count in zip(labels, counts))
    picture.alt = (
        f"Bars of how many of {len(words):,} answers have how many words: {said}; the last are dropped. All in all "
        f"{median} words, the longest has {max(words):,}."
    )
    return picture


@in_style
def token_lengths(lengths: Sequence[int], max_length: int) -> Picture:
    """Return the histogram of the rows' tokens, with the line where a row is cut.

    Args:
        lengths: tokens of each row without padding, before or after the cut at `max_length`.
    """
    values, step = np.minimum(lengths, max_length), max(1, round(max_length / 40))
    full = int((values == max_length).sum())
    picture, (axes,) = figure(7.5, 3)
    axes.hist(values[values < max_length], bins=np.arange(max_length, -step, -step)[::-1], **TUNED)
    axes.bar(max_length, full, step, align="edge", **BASE)
    axes.axvline(max_length, color=INK, linestyle="--", linewidth=1.5)
    axes.set_xlim(0, max_length + 2 * step)
    axes.margins(y=0.35)
    note = f"cut at {max_length} tokens:\n{full:,} of {len(lengths):,} rows reach it"
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "ha": "right"}
    axes.annotate(note, (max_length, 1), (-6, -2), **place)
    axes.set(title="How long the rows are", xlabel="prompt and answer (tokens)", ylabel="rows")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    picture.alt = (
        f"Histogram of the rows' tokens: median {np.median(lengths):.0f}, longest {max(lengths)}. A line at "
        f"{max_length} tokens; {full:,} of {len(lengths):,} rows reach it and are cut there."
    )
    return picture


@in_style
def parameters(trainable: int, total: int) -> Picture:
    """Return two squares whose areas are the parameters of the base model and of its LoRA adapter.

    Args:
        trainable, total: as `model.get_nb_trainable_parameters()` returns them; `total` includes the adapter.
    """
    base, share = total - trainable, f"{trainable / total:.2%}"
    side = (trainable / base) ** 0.5
    picture, (axes,) = figure(7.5, 2.8)
    axes.add_patch(Rectangle((0, 0), 1, 1, **BASE))
    axes.add_patch(Rectangle((1.15, 0), side, side, **TUNED))
    axes.text(0.5, 0.5, f"base model\n{base:,} parameters\nstay as they are", ha="center", va="center", bbox=PAPER)
    axes.text(1.2 + side, 0, f"LoRA\n{trainable:,} parameters\nare trained: {share} of all,\nbase and LoRA together")
    axes.text(1.15, 0.94, "areas in proportion to the number of parameters", style="italic")
    axes.set(xlim=(-0.01, max(2.4, 2 + side)), ylim=(-0.02, max(1.02, side)), aspect="equal")
    axes.axis("off")
    picture.alt = (
        f"Two squares with areas in proportion: the {base:,} parameters of the base model, which stay, and "
        f"the {trainable:,} of LoRA, which are trained, {share} of all."
    )
    return picture


@in_style
def losses(log_history: Sequence[Mapping[str, float]], base_loss: float | None = None) -> Picture:
    """Return train and held-out loss over the steps, on a logarithmic axis, and below them the learning rate.

    Args:
        log_history: `trainer.state.log_history`. Its `loss` is the mean over the steps since the last line of the log,
            so it is drawn as a level over these steps.
        base_loss: the `eval_loss` of `trainer.evaluate()` before training, in nats per learned token; None: not drawn.
    """
    train, heldout, rate = (
        [(entry["step"], entry[key]) for entry in log_history if key in entry]
        for key in ("loss", "eval_loss", "learning_rate")
    )
    if base_loss is not None and (not heldout or heldout[0][0] > 0):
        heldout.insert(0, (0, base_loss))  # a new adapter changes nothing
    last = max([entry["step"] for entry in log_history], default=0)
    picture, (upper, lower) = figure(7.5, 4.2, rows=2, sharex=True, height_ratios=[3, 1])
    _log_axis(upper, [value for _, value in train + heldout if 0 < value < math.inf])
    if train:
        steps, values = zip(*train)
        label = "training rows, mean over the steps since the previous log line"
        upper.stairs(values, [0, *steps], baseline=None, color=BLUE, linewidth=1.6, label=label)
    if heldout:
        look = {"color": ORANGE, "marker": "s", "markersize": 6, "markeredgecolor": INK, "clip_on": False, "zorder": 3}
        upper.plot(*zip(*heldout), **look, label="held-out rows, at that step")
    if base_loss is not None:
        upper.axhline(base_loss, color=INK, linestyle="--", linewidth=1.2)
        place = {"textcoords": "offset points", "ha": "right", "va": "bottom", "bbox": PAPER}
        upper.annotate(f"base model, held-out rows: {base_loss:.2f}", (last, base_loss), (0, 3), **place)
    if rate:
        lower.plot(*zip(*rate), color=INK, linewidth=1.3)
    if train or heldout:
        picture.legend(loc="outside lower center", ncols=2)
    upper.grid(axis="y")
    upper.set(title="Loss while training", ylabel="loss (nats per token)", xlim=(0, max(last, 1)))
    lower.set(ylabel="learning rate", xlabel="optimizer steps")
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    said = [
        f"the {name} loss goes from {line[0][1]:.3g} to {line[-1][1]:.3g}"
        for name, line in (("training", train), ("held-out", heldout))
        if line
    ]
    if base_loss is not None:
        said.append(f"a dashed line is the base model's held-out loss, {base_loss:.2f}")
    picture.alt = f"Curves over {last} steps: {', '.join(said) or 'no losses'}; below them the learning rate."
    return picture


def _log_axis(axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic, with room above and ticks in plain numbers, whether it spans decades or little."""
    low, high = min(values, default=1), max(values, default=1)
    axes.set_yscale("log")
    axes.set_ylim(low / (high / low) ** 0.1 / 1.02, high * (high / low) ** 0.15 * 1.02)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


SIDES = {"base_bare": ("base, bare question", BARE), "base": ("base", BASE), "tuned": ("tuned", TUNED)}


@in_style
def before_after(metrics: Mapping) -> Picture:
    """Return the metrics of `comparison` as bars with 95% intervals, base and tuned.

    Args:
        metrics: as `evaluation.evaluate` returns them, or `metrics.json` holds them.
    """
    names = [name for name in main_metrics(metrics) if METRICS[name].unit == "%"]
    picture = Picture(figsize=(9, 3.6), layout="constrained")
    grid = picture.add_gridspec(2, 2, width_ratios=[2, 1])
    shares, loss, length = (picture.add_subplot(part) for part in (grid[:, 0], grid[0, 1], grid[1, 1]))
    _bars(shares, metrics, names, 100)
    shares.set(title=f"Base against tuned, {metrics['n']} held-out rows", xlim=(0, 115), xlabel="share (%)")
    shares.set_xticks(range(0, 101, 20))
    for axes, name in ((loss, "answer_loss"), (length, "mean_answer_tokens")):
        _bars(axes, metrics, [name], 1)
        axes.set(xlabel=f"{METRICS[name].label} ({METRICS[name].unit})", yticks=[])
        axes.margins(x=0.25)
    handles, labels = shares.get_legend_handles_labels()
    order = [labels.index(label) for label, _ in SIDES.values() if label in labels]
    picture.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=3)
    said = (
        f"{METRICS[name].label} {_shown(metrics, 'base', name)} before, {_shown(metrics, 'tuned', name)} after"
        for name in main_metrics(metrics)
    )
    picture.alt = (
        "Bars with 95% intervals for the base, also asked the bare question, and the tuned model: "
        + "; ".join(said)
        + "."
    )
    return picture


def _bars(axes, metrics: Mapping, names: Sequence[str], scale: float) -> None:
    """Draw a group of bars for each metric, a bar for each side that has it."""
    labels = []
    for group, name in enumerate(names):
        metric = METRICS[name]
        hint = {1: "", -1: "\n(less is better)", 0: ""}[metric.better]
        labels.append(metric.label + hint)
        shown = [side for side in SIDES if metrics[side][name] is not None]
        for place, side in enumerate(shown):
            value, (low, high) = metrics[side][name], metrics[side]["intervals"][name]
            y = group + (place - (len(shown) - 1) / 2) * 0.27
            label, look = SIDES[side]
            axes.barh(y, scale * value, 0.25, label="" if group else label, **look)
            ends = [[scale * max(0, value - low)], [scale * max(0, high - value)]]
            axes.errorbar(
                scale * value, y, xerr=ends, color=ORANGE if side == "tuned" else INK, capsize=2.5, linewidth=1.4
            )
            look = {"textcoords": "offset points", "va": "center", "size": 8.5}
            axes.annotate(_shown(metrics, side, name), (scale * high, y), (5, 0), **look)
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)


def _shown(metrics: Mapping, side: str, name: str) -> str:
    return METRICS[name].show(metrics[side][name], change=metrics["tuned"][name] - metrics["base"][name])


@in_style
def answer_lengths(answers: pd.DataFrame, max_new_tokens: int = 80) -> Picture:
    """Return how long the answers of base and tuned model and the expected ones are, in tokens.

    Args:
        answers: the table that `evaluation.evaluate` returns.
        max_new_tokens: where an answer that did not stop was cut.
    """
    picture, panels = figure(7.5, 4.2, rows=3, sharex=True)
    longest = max(max_new_tokens, int(answers["output_tokens"].max()))
    bins = np.arange(-0.5, longest + 3, max(1, round(longest / 40)))
    said = []
    for axes, side in zip(panels, ("base", "tuned")):
        lengths, stopped = answers[f"{side}_tokens"], answers[f"{side}_stopped"].astype(bool)
        labels = ["stopped by itself", f"cut at {max_new_tokens} tokens"]
        _, _, bars = axes.hist([lengths[stopped], lengths[~stopped]], bins=bins, stacked=True, label=labels)
        for container, look in zip(bars, (TUNED, BASE)):
            for bar in container:
                bar.update(look)
        axes.set_title(f"{side} model: mean {lengths.mean():.1f} tokens", size=10)
        said.append(f"{side} {lengths.mean():.1f} tokens on average, {stopped.mean():.0%} stop by themselves")
    panels[0].legend(loc="upper left")
    panels[2].hist(answers["output_tokens"], bins=bins, **EXPECTED)
    panels[2].set_title(f"expected answers: mean {answers['output_tokens'].mean():.1f} tokens", size=10)
    said.append(f"expected {answers['output_tokens'].mean():.1f} tokens on average")
    panels[2].set_xlabel("answer (tokens)")
    for axes in panels:
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    picture.supylabel("answers", size=10)
    picture.alt = "Three histograms of answer lengths: " + "; ".join(said) + "."
    return picture


def answers_table(answers: pd.DataFrame, rows: int = 8, letters: int = 160) -> HTML:
    """Return answers side by side as a table, evenly spread over the rows: question, expected, base, tuned.

    ✓ and ✗ tell whether an answer holds the fact; … ends an answer that did not stop, or is longer than `letters`.
    """

    def shown(text: str, stopped: bool = True, right: bool | None = None) -> str:
        line = " ".join(text.split())
        cut = "" if stopped and len(line) <= letters else " …"
        mark = "" if pd.isna(right) else "✓ " if right else "✗ "
        return mark + line[:letters].rstrip() + cut

    chosen = sorted(set(np.linspace(0, len(answers) - 1, rows).round().astype(int)))
    table = [
        {
            "question": shown(f"{row.instruction} {row.input}"),
            "expected": shown(row.output),
            "base": shown(row.base, row.base_stopped, row.base_right),
            "tuned": shown(row.tuned, row.tuned_stopped, row.tuned_right),
        }
        for row in answers.iloc[chosen].itertuples()
    ]
    # text of a user or a model: escaped, and no $…$ in it is taken for a formula
    with pd.option_context("display.max_colwidth", None, "display.html.use_mathjax", False):
        return HTML(pd.DataFrame(table).to_html(index=False, justify="left", border=0))
