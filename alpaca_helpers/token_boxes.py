"""One row as coloured tokens: what is prompt, answer, end of text and padding, and which of it is learned."""

from collections.abc import Mapping, Sequence
from functools import cache

from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle

from .data import IGNORED, RECIPES, tokenize
from .picture import BLUE, INK, ORANGE, Picture, in_style
from .prompts import encode, format_prompt

# How each part of a row looks: fill where learned, text on that fill, border.
PARTS: dict[str, tuple[str, str, dict]] = {
    "prompt": ("#bdbdbd", INK, {"linestyle": (0, (2, 1.5)), "linewidth": 0.8}),
    "answer": (BLUE, "white", {"linewidth": 0.8}),
    "end of text": (ORANGE, INK, {"linewidth": 2.2}),
    "padding": ("white", INK, {"linewidth": 0.8, "hatch": "////"}),
}
CELLS = 116  # characters in a line of the tokens' picture


@in_style
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
