"""The one style of the pictures, how one is saved and shown, and answers side by side in a table.

Colours differ in lightness and come with a hatch, a marker or a word, so that each picture reads in black and white and
by the colour-blind (Okabe and Ito's palette).
"""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from IPython.display import HTML, Image
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from alpaca_helpers.files import replace_recorded

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

    `alt` describes it for readers who cannot see it. Errors as in `replace_recorded`.
    """
    plt.close(figure)  # else Jupyter would show a figure of pyplot's once more
    png = io.BytesIO()
    figure.savefig(png, format="png", bbox_inches="tight")
    replace_recorded(path, png.getvalue())
    return Image(png.getvalue(), format="png", metadata={"alt": alt})


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
