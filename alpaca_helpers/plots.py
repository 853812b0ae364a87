"""Every picture of the series, in one style: each function returns a figure that says in `alt` what it shows.

Colours differ in lightness and come with a hatch, a marker or a word, so that each picture reads in black and white and
by the colour-blind (Okabe and Ito's palette).
"""

import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache, wraps
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .data import IGNORED, RECIPES, encode, tokenize
from .evaluation import METRICS, Metric
from .prompts import format_prompt

INK, PALE, BLUE, ORANGE = "#222222", "#e4e4e4", "#0072b2", "#e69f00"
BASE = {"facecolor": PALE, "edgecolor": INK, "hatch": "///", "linewidth": 0.8}
TUNED = {"facecolor": BLUE, "edgecolor": INK, "linewidth": 0.8}
BARE = {"facecolor": "white", "edgecolor": INK, "hatch": "...", "linewidth": 0.8}
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 110,
}


class Picture(Figure):
    """A figure that a notebook shows by itself, with its alternative text; pyplot has no part in it."""

    alt = ""

    def png(self) -> bytes:
        """Return the picture as PNG."""
        file = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(file, format="png", metadata={"Software": None, "Description": self.alt})
        return file.getvalue()

    def save(self, path: Path) -> "Picture":
        """Write the picture as PNG, whole or not at all, and return it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(self.png())
        os.replace(part, path)
        return self

    def _repr_mimebundle_(self, **_) -> tuple[dict, dict]:
        return {"image/png": self.png(), "text/plain": repr(self)}, {"image/png": {"alt": self.alt}}


def _in_style(draw):
    """Make a drawing function use `STYLE`."""

    @wraps(draw)
    def styled(*args, **kwargs) -> Picture:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Picture, list]:
    picture = Picture(figsize=(width, height), layout="constrained")
    return picture, list(picture.subplots(rows, columns, squeeze=False, **options).flat)


@_in_style
def word_counts(words: Sequence[int], max_words: int) -> Picture:
    """Return the histogram of the answers' words, with the line beyond which a row is dropped."""
    over = sum(count > max_words for count in words)
    picture, (axes,) = _figure(7.5, 3)
    _histogram(
        axes, words, max_words, f"at most {max_words} words;\n{over:,} of {len(words):,} rows\nare longer: dropped"
    )
    axes.set(title="How long the answers are", xlabel="answer (words)", ylabel="rows")
    picture.alt = (
        f"Histogram of the answers' words: median {np.median(words):.0f}, longest {max(words)}. A line at {max_words} "
        f"words; {over:,} of {len(words):,} rows lie beyond it and are dropped."
    )
    return picture


@_in_style
def token_lengths(lengths: Sequence[int], max_length: int, dropped: Mapping[str, int] | None = None) -> Picture:
    """Return the histogram of the rows' tokens, with the line where a row is cut, and what the filter dropped.

    Args:
        lengths: tokens of each kept row without padding, before or after the cut at `max_length`.
        dropped: rows that the filter dropped, by reason, as `filter_rows` returns them.
    """
    full = sum(length >= max_length for length in lengths)
    picture, axes = _figure(9, 3, columns=2, width_ratios=[2, 1]) if dropped else _figure(7.5, 3)
    note = f"cut at {max_length} tokens;\n{full:,} of {len(lengths):,} rows\nreach it"
    _histogram(axes[0], lengths, max_length, note)
    axes[0].set(title="How long the rows are", xlabel="prompt and answer (tokens)", ylabel="rows")
    picture.alt = (
        f"Histogram of the rows' tokens: median {np.median(lengths):.0f}, longest {max(lengths)}. A line at "
        f"{max_length} tokens; {full:,} of {len(lengths):,} rows reach it and are cut there."
    )
    if dropped:
        counts = {"kept": len(lengths), **dropped}
        bars = axes[1].barh(list(counts), list(counts.values()), 0.6)
        for bar, look in zip(bars, [TUNED] + [BASE] * len(dropped)):
            bar.update(look)
        axes[1].bar_label(bars, [f"{count:,}" for count in counts.values()], padding=3)
        axes[1].invert_yaxis()
        axes[1].margins(x=0.25)
        axes[1].xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes[1].set(title="What the filter drops", xlabel="rows")
        picture.alt += " Beside it, as bars: " + ", ".join(f"{name} {n:,} rows" for name, n in counts.items()) + "."
    return picture


def _histogram(axes, values: Sequence[int], limit: int, note: str) -> None:
    """Draw the values within the limit filled and those beyond it hatched, and the limit as a line with a note."""
    longest = max(*values, limit)
    step = max(1, round(longest / 40))
    edges = np.arange(limit + 0.5 - step * math.ceil((limit + 0.5) / step), longest + step + 0.5, step)
    axes.hist([value for value in values if value <= limit], bins=edges, **TUNED)
    axes.hist([value for value in values if value > limit], bins=edges, **BASE)
    axes.axvline(limit + 0.5, color=INK, linestyle="--", linewidth=1.5)
    axes.set_xlim(0, edges[-1] + 1)
    right = limit < 0.65 * longest
    axes.set_ylim(top=axes.get_ylim()[1] * (1.2 if right else 1.5))
    axes.annotate(
        note,
        (limit + 0.5, 1),
        (6 if right else -6, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        ha="left" if right else "right",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


# How each part of a row looks: fill where learned, text on that fill, border.
PARTS: dict[str, tuple[str, str, dict]] = {
    "prompt": ("#bdbdbd", INK, {"linestyle": (0, (2, 1.5)), "linewidth": 0.8}),
    "answer": (BLUE, "white", {"linewidth": 0.8}),
    "end of text": (ORANGE, INK, {"linewidth": 2.2}),
    "padding": ("white", INK, {"linewidth": 0.8, "hatch": "////"}),
}
CELLS = 116  # characters in a line of the tokens' picture


@_in_style
def tokens(
    row: Mapping[str, str], tokenizer, recipes: Sequence[str] = ("document", "answers"), max_length: int = 128
) -> Picture:
    """Return one row as boxes, one a token, as each recipe makes it, one recipe above the other.

    Filled boxes are learned, white ones only read; the border tells prompt, answer, end of text and padding apart. A
    space shows as ·, a new line as ↵, and all padding is one hatched box.

    Args:
        row: the columns `instruction`, `input`, `output`.
        recipes: keys of `data.RECIPES`.
    """
    said, blocks = [], []
    for recipe in recipes:
        made = tokenize({key: [value] for key, value in row.items()}, tokenizer, recipe, max_length)
        ids, labels = made["input_ids"][0], made["labels"][0]
        held = sum(made.get("attention_mask", [[1] * len(ids)])[0])
        asked = format_prompt(row["instruction"], row["input"] if "input" in RECIPES[recipe] else "")
        prompt = min(len(encode([asked], tokenizer)[0]), held)
        end = int("eos" in RECIPES[recipe] and ids[held - 1] == tokenizer.eos_token_id)
        parts = ["prompt"] * prompt + ["answer"] * (held - end - prompt) + ["end of text"] * end
        boxes = [
            (part, part if part == "end of text" else _visible(tokenizer.decode([id])), label != IGNORED)
            for part, id, label in zip(parts, ids, labels)
        ]
        padding = len(ids) - held
        if padding:
            boxes.append(("padding", f"padding: {padding} times the end-of-text token", False))
        blocks += [[("title", f"recipe {recipe}", False)], *_wrap(boxes)]
        learned = sum(label != IGNORED for label in labels)
        said.append(
            f"recipe {recipe}: {prompt} tokens of prompt, {held - end - prompt} of answer, {end} end of text, "
            f"{padding} of padding; {learned} are learned"
        )
    blocks += [[("title", "learned", False)] + [(part, part, True) for part in ("prompt", "answer", "end of text")]]
    blocks[-1] += [("title", "   only read", False)] + [(part, part, False) for part in PARTS]
    picture = Picture(figsize=(9, 0.3 * len(blocks) + 0.1))
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1, CELLS + 1), ylim=(len(blocks) + 0.1, -0.1))
    axes.axis("off")
    for line, boxes in enumerate(blocks):
        start = 0.0
        for part, text, learned in boxes:
            start += _draw_box(axes, start, line, part, text, learned)
    picture.alt = "One row as coloured tokens. " + ". ".join(said).capitalize() + "."
    return picture


def _visible(text: str) -> str:
    """Return a token's text as it can be drawn: spaces and new lines as marks, □ for what the font lacks."""
    text = text.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    return "".join(letter if ord(letter) in _drawable() else "□" for letter in text)


@cache
def _drawable() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans Mono")).get_charmap())


def _wrap(boxes: list[tuple[str, str, bool]]) -> list[list[tuple[str, str, bool]]]:
    """Return the boxes in lines of at most `CELLS` characters."""
    lines: list[list[tuple[str, str, bool]]] = [[]]
    used = 0
    for part, text, learned in boxes:
        text = text if len(text) <= CELLS - 2 else text[: CELLS - 3] + "…"
        if used + len(text) + 1 > CELLS and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append((part, text, learned))
        used += len(text) + 1
    return lines


def _draw_box(axes, start: float, line: int, part: str, text: str, learned: bool) -> float:
    """Draw a token's box, or a plain title, and return its width in characters."""
    width, font = len(text) + 0.8, {"family": "DejaVu Sans Mono", "size": 9, "va": "center", "parse_math": False}
    if part == "title":
        axes.text(start, line + 0.5, text, weight="bold", **font)
        return width + 0.4
    fill, ink, border = PARTS[part]
    box = {"facecolor": fill if learned else "white", "edgecolor": INK, **border}
    axes.add_patch(Rectangle((start, line + 0.1), width, 0.8, **box))
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5} if part == "padding" else None
    axes.text(start + 0.4, line + 0.5, text, color=ink if learned else INK, bbox=paper, **font)
    return width + 0.2


@_in_style
def parameters(trainable: int, total: int) -> Picture:
    """Return two squares whose areas are the parameters of the base model and of its LoRA adapter.

    Args:
        trainable, total: as `model.get_nb_trainable_parameters()` returns them; `total` includes the adapter.
    """
    base = total - trainable
    side = math.sqrt(trainable / base)
    picture, (axes,) = _figure(7.5, 2.8)
    axes.add_patch(Rectangle((0, 0), 1, 1, **BASE))
    axes.add_patch(Rectangle((1.15, 0), side, side, **TUNED))
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 3}
    axes.text(0.5, 0.5, f"base model\n{base:,} parameters\nstay as they are", ha="center", va="center", bbox=paper)
    axes.text(1.2 + side, 0, f"LoRA\n{trainable:,} parameters\nare trained: {trainable / base:.2%} of the base")
    axes.text(1.15, 0.94, "areas in proportion to the number of parameters", style="italic")
    axes.set(xlim=(-0.01, max(2.4, 2 + side)), ylim=(-0.02, max(1.02, side)), aspect="equal")
    axes.axis("off")
    picture.alt = (
        f"Two squares with areas in proportion: the {base:,} parameters of the base model, which stay, and "
        f"the {trainable:,} of LoRA, which are trained, {trainable / base:.2%} of the base."
    )
    return picture


@_in_style
def losses(log_history: Sequence[Mapping[str, float]]) -> Picture:
    """Return train and held-out loss over the steps, and below them the learning rate.

    Args:
        log_history: `trainer.state.log_history`.
    """
    train, heldout, rate = (
        [(entry["step"], entry[key]) for entry in log_history if key in entry]
        for key in ("loss", "eval_loss", "learning_rate")
    )
    picture, (upper, lower) = _figure(7.5, 4, rows=2, sharex=True, height_ratios=[3, 1])
    upper.plot(*zip(*train), color=BLUE, linewidth=1.3, label="training rows") if train else None
    heldout_style = {"color": ORANGE, "marker": "s", "markersize": 5, "markeredgecolor": INK, "linestyle": "--"}
    upper.plot(*zip(*heldout), label="held-out rows", **heldout_style) if heldout else None
    lower.plot(*zip(*rate), color=INK, linewidth=1.3) if rate else None
    upper.grid(axis="y")
    upper.set(title="Loss while training", ylabel="loss (nats per token)")
    lower.set(ylabel="learning rate", xlabel="optimizer steps")
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if train or heldout:
        upper.legend()
    said = [
        f"the {name} loss goes from {line[0][1]:.2f} to {line[-1][1]:.2f}"
        for name, line in (("training", train), ("held-out", heldout))
        if line
    ]
    last = log_history[-1]["step"] if log_history else 0
    picture.alt = f"Curves over {last} steps: {', '.join(said) or 'no losses'}; below them the learning rate."
    return picture


SIDES = {"base_bare": ("base, bare question", BARE), "base": ("base", BASE), "tuned": ("tuned", TUNED)}
SHARES = ("contains", "exact_match", "stop_rate", "rouge_l", "repetition", "echo_rate")


@_in_style
def before_after(metrics: Mapping) -> Picture:
    """Return the metrics of base and tuned as bars with 95% intervals.

    Args:
        metrics: as `evaluation.evaluate` returns them, or `metrics.json` holds them.
    """
    names = [name for name in SHARES if metrics["tuned"][name] is not None]
    picture = Picture(figsize=(9, 0.75 * len(names) + 1.3), layout="constrained")
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
        f"{METRICS[name].label} {METRICS[name].show(metrics['base'][name])} before, "
        f"{METRICS[name].show(metrics['tuned'][name])} after"
        for name in (*names, "answer_loss", "mean_answer_tokens")
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
            axes.annotate(
                metric.show(value), (scale * high, y), (5, 0), textcoords="offset points", va="center", size=8.5
            )
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)


@_in_style
def answer_lengths(answers: pd.DataFrame, max_new_tokens: int = 80) -> Picture:
    """Return how long the answers of base and tuned model and the expected ones are, in tokens.

    Args:
        answers: the table that `evaluation.evaluate` returns.
        max_new_tokens: where an answer that did not stop was cut.
    """
    picture, panels = _figure(7.5, 4.2, rows=3, sharex=True, sharey=True)
    longest = max(max_new_tokens, int(answers["output_tokens"].max()))
    bins = np.arange(-0.5, longest + 3, max(1, round(longest / 40)))
    said = []
    for axes, side in zip(panels, ("base", "tuned")):
        lengths, stopped = answers[f"{side}_tokens"], answers[f"{side}_stopped"].astype(bool)
        looks = [TUNED, BASE]
        _, _, bars = axes.hist([lengths[stopped], lengths[~stopped]], bins=bins, stacked=True)
        for container, look in zip(bars, looks):
            for bar in container:
                bar.update(look)
        bars[0].set_label("stopped by itself")
        bars[1].set_label(f"cut at {max_new_tokens} tokens")
        said.append(f"{side} {lengths.mean():.1f} tokens on average, {stopped.mean():.0%} stop by themselves")
        axes.set_title(f"{side} model: mean {lengths.mean():.1f} tokens", size=10)
    panels[0].legend(loc="upper left")
    panels[2].hist(answers["output_tokens"], bins=bins, facecolor="white", edgecolor=INK, linewidth=0.8)
    panels[2].set_title(f"expected answers: mean {answers['output_tokens'].mean():.1f} tokens", size=10)
    said.append(f"expected {answers['output_tokens'].mean():.1f} tokens on average")
    panels[2].set_xlabel("answer (tokens)")
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


@_in_style
def recipes(lines: Sequence[Mapping], metrics: Mapping[str, Metric]) -> Picture:
    """Return what each choice of settings came to: a dot a seed, a bar at their mean, a panel a metric.

    Args:
        lines: a mapping a choice, with `choice` and for each metric its `mean` and `values`.
        metrics: the metrics to show, with their names.
    """
    names = [_choice(line["choice"]) for line in lines]
    shown = [name for name in metrics if all(line[name]["values"] for line in lines)]
    picture, panels = _figure(10, 0.32 * len(lines) + 1.3, columns=len(shown), sharey=True)
    for axes, name in zip(panels, shown):
        metric = metrics[name]
        scale = 100 if metric.unit == "%" else 1
        for y, line in enumerate(lines):
            values = [scale * value for value in line[name]["values"]]
            axes.barh(y, scale * line[name]["mean"], 0.7, facecolor=PALE, edgecolor=INK, linewidth=0.8)
            axes.plot(values, [y] * len(values), "o", color=BLUE, markeredgecolor="white", markersize=5, clip_on=False)
        axes.set_xlim(0, 105 if scale == 100 else None)
        axes.set_xlabel(f"{textwrap.fill(metric.label, 14)}\n({metric.unit})")
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    said = (
        f"{name}: " + ", ".join(f"{metrics[key].label} {metrics[key].show(line[key]['mean'])}" for key in shown)
        for name, line in zip(names, lines)
    )
    picture.alt = "A bar a choice at the mean over seeds, a dot a seed. " + "; ".join(said) + "."
    return picture


def _choice(choice: Mapping[str, object]) -> str:
    return ", ".join(
        str(value) if name == "recipe" else f"{name.removeprefix('lora_').replace('_', ' ')} {value}"
        for name, value in choice.items()
    )
