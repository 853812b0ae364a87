"""The one style of the pictures, how they are saved and shown, and those of the training and the comparison.

Colours differ in lightness and come with a hatch, a marker or a word, so that each picture reads in black and white and
by the colour-blind (Okabe and Ito's palette).
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from IPython.display import HTML, Image
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .files import check_disk_space, replace_file

INK, PALE, BLUE, ORANGE = "#222222", "#e4e4e4", "#0072b2", "#e69f00"
BASE = {"facecolor": PALE, "edgecolor": INK, "hatch": "///", "linewidth": 0.8}
TUNED = {"facecolor": BLUE, "edgecolor": INK, "linewidth": 0.8}
STYLE = {
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "figure.dpi": 110,
}
in_style = matplotlib.rc_context(STYLE)  # decorates a function that draws


def save_picture(figure: Figure, path: Path, alt: str) -> Image:
    """Write the figure to `path` as PNG and return it for the notebook to show.

    `alt` describes it for readers who cannot see it. Raises AlpacaError where the file cannot be written.
    """
    plt.close(figure)  # else Jupyter would show a figure of pyplot's once more
    png = io.BytesIO()
    figure.savefig(png, format="png", bbox_inches="tight")
    with check_disk_space(path, needed=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, png.getvalue())
    return Image(png.getvalue(), format="png", metadata={"alt": alt})


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
