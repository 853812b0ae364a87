"""Texts as coloured tokens: the parts of a row and which of them are learned, or how the model ranks each token."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from IPython.display import Image
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Patch, Rectangle

from alpaca_helpers.data import IGNORED, RECIPES, tokenize
from alpaca_helpers.prompts import encode, format_prompt
from alpaca_lessons.plots import BLUE, INK, ORANGE, in_style, save_picture

PARTS: dict[str, dict] = {  # how each part of a row looks where it is learned; elsewhere its fill is white
    "prompt": {"facecolor": "#bdbdbd", "linestyle": (0, (2, 1.5)), "linewidth": 0.8},
    "answer": {"facecolor": BLUE, "linewidth": 0.8},
    "end of text": {"facecolor": ORANGE, "linewidth": 2.2},
    "padding": {"facecolor": "white", "linewidth": 0.8, "hatch": "////"},
}
FONT = {"family": "DejaVu Sans Mono", "size": 9, "va": "center", "parse_math": False}
WIDTH = 116  # characters in a line


@in_style
def tokens(
    row: Mapping[str, str], tokenizer, max_length: int, path: Path, recipes: Sequence[str] = ("document", "answers")
) -> Image:
    """Draw one row as boxes, one a token, as each of `recipes` makes it; return the picture saved to `path`.

    Filled boxes are learned, white ones only read; the border tells prompt, answer, end of text and padding apart. A
    space shows as ·, a new line as ↵, and all padding is one hatched box.
    """
    lines, counts, white = {}, "", {"facecolor": "white"}
    for recipe in recipes:
        boxes = list(_boxes(row, tokenizer, recipe, max_length))
        lines[f"Recipe {recipe}"] = [(text, PARTS[part] | ({} if learned else white)) for part, text, learned in boxes]
        counts += f" Recipe {recipe}: {sum(learned for *_, learned in boxes)} tokens are learned."
    figure = _drawn(lines, PARTS, "filled: learned; white: only read")
    return save_picture(figure, path, f"One row as coloured tokens.{counts}")


@in_style
def shaded(lines: Mapping[str, Sequence[tuple[str, str]]], shades: Sequence[str], title: str, path: Path) -> Image:
    """Draw each text under its heading as boxes, one a token, the darker the later its shade stands in `shades`.

    `title` stands over the legend and says what the shades mean. Return the picture saved to `path`.
    """
    looks = {shade: {"facecolor": fill, "linewidth": 0.8} for shade, fill in zip(shades, shade_colors(shades))}
    boxes, alt = {}, "Tokens in shades."
    for heading, tokens in lines.items():
        boxes[heading] = [(_visible(text), looks[shade]) for text, shade in tokens]
        counts = Counter(shade for _, shade in tokens)
        alt += f" {heading}: {', '.join(f'{shade} {counts[shade]}' for shade in shades)}."
    return save_picture(_drawn(boxes, looks, title), path, alt)


def shade_colors(shades: Sequence[str]) -> list[tuple[float, ...]]:
    """Return the colours of `shaded`, from white to dark blue, for another picture of the same shades."""
    return [tuple(color) for color in colormaps["Blues"](np.linspace(0, 0.85, len(shades)))]


def _visible(token: str) -> str:
    """Return a token's text with marks for its spaces, new lines and tabs."""
    return token.replace("\n", "↵").replace("\t", "→").replace(" ", "·")


def _drawn(lines: Mapping[str, Sequence[tuple[str, dict]]], legend: Mapping[str, dict], title: str) -> Figure:
    """Return the tokens under their headings, each as a box with its look, the keywords of a matplotlib patch."""
    figure, line = Figure(), 0
    axes = figure.add_axes((0, 0, 1, 1))
    drawable = get_font(findfont(FONT["family"])).get_charmap()
    for heading, boxes in lines.items():
        axes.text(0, line + 0.5, heading, weight="bold", **FONT)
        line, start = line + 1, 0
        for token, look in boxes:
            text = "".join(letter if ord(letter) in drawable else "□" for letter in token)[: WIDTH - 1]
            if start + len(text) + 1 > WIDTH:
                line, start = line + 1, 0
            axes.add_patch(Rectangle((start, line + 0.1), len(text) + 0.8, 0.8, edgecolor=INK, **look))
            paper = {"facecolor": look["facecolor"], "edgecolor": "none", "pad": 0.5}  # no hatch behind the text
            dark = np.dot(to_rgb(look["facecolor"]), (0.3, 0.59, 0.11)) < 0.5  # as the eye weighs red, green and blue
            axes.text(start + 0.4, line + 0.5, text, color="white" if dark else INK, bbox=paper, **FONT)
            start += len(text) + 1
        line += 1
    handles = [Patch(edgecolor=INK, label=label, **look) for label, look in legend.items()]
    figure.legend(handles=handles, title=title, alignment="left", loc="lower left", ncols=len(handles))
    figure.set_size_inches(9, 0.3 * line + 0.6)
    axes.set(xlim=(-1, WIDTH + 1), ylim=(line + 2, -0.1))
    axes.axis("off")
    return figure


def _boxes(row: Mapping[str, str], tokenizer, recipe: str, max_length: int) -> Iterator[tuple[str, str, bool]]:
    """Yield each token's part, its text and whether it is learned; all padding at once."""
    made = tokenize({key: [value] for key, value in row.items()}, tokenizer, recipe, max_length)
    ids, labels = made["input_ids"][0], made["labels"][0]
    held = sum(made["attention_mask"][0]) if "attention_mask" in made else len(ids)
    asked = format_prompt(row["instruction"], row["input"] if "input" in RECIPES[recipe] else "")
    prompt = len(encode([asked], tokenizer)[0])
    for place, (id, label) in enumerate(zip(ids[:held], labels)):
        part = "prompt" if place < prompt else "end of text" if id == tokenizer.eos_token_id else "answer"
        yield part, part if part == "end of text" else _visible(tokenizer.decode([id])), label != IGNORED and place > 0
    if held < len(ids):
        token = "end-of-text" if tokenizer.pad_token_id == tokenizer.eos_token_id else "padding"
        yield "padding", f"padding: {len(ids) - held} times the {token} token", False
