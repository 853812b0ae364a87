"""A picture of the series: a figure in one style that a notebook shows by itself, with words for who cannot see it.

Colours differ in lightness and come with a hatch, a marker or a word, so that each picture reads in black and white and
by the colour-blind (Okabe and Ito's palette).
"""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .files import check_disk_space

INK, PALE, BLUE, ORANGE = "#222222", "#e4e4e4", "#0072b2", "#e69f00"
BASE = {"facecolor": PALE, "edgecolor": INK, "hatch": "///", "linewidth": 0.8}
TUNED = {"facecolor": BLUE, "edgecolor": INK, "linewidth": 0.8}
BARE = {"facecolor": "white", "edgecolor": INK, "hatch": "...", "linewidth": 0.8}
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


class Picture(Figure):
    """A figure without pyplot; `alt` says in words what it shows."""

    alt = ""

    def save(self, path: Path) -> "Picture":
        """Write the picture as PNG and return it."""
        with check_disk_space(path, needed=0):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.savefig(path, format="png")
        return self

    def _repr_mimebundle_(self, **_) -> tuple[dict, dict]:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return {"image/png": file.getvalue(), "text/plain": repr(self)}, {"image/png": {"alt": self.alt}}
