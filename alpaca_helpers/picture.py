"""A picture of the series: a figure in the one style that shows itself in a notebook and says in `alt` what it shows.

Colours differ in lightness and come with a hatch, a marker or a word, so that each picture reads in black and white and
by the colour-blind (Okabe and Ito's palette).
"""

import io
import os
from functools import wraps
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

INK, PALE, BLUE, ORANGE = "#222222", "#e4e4e4", "#0072b2", "#e69f00"
BASE = {"facecolor": PALE, "edgecolor": INK, "hatch": "///", "linewidth": 0.8}
TUNED = {"facecolor": BLUE, "edgecolor": INK, "linewidth": 0.8}
BARE = {"facecolor": "white", "edgecolor": INK, "hatch": "...", "linewidth": 0.8}
EXPECTED = {"facecolor": "#a6a6a6", "edgecolor": INK, "linewidth": 0.8}
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 2}  # under words on a hatch or a line
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


def in_style(draw):
    """Make a drawing function use `STYLE`."""

    @wraps(draw)
    def styled(*args, **kwargs) -> Picture:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Picture, list]:
    """Return a picture and its axes, row by row."""
    picture = Picture(figsize=(width, height), layout="constrained")
    return picture, list(picture.subplots(rows, columns, squeeze=False, **options).flat)
