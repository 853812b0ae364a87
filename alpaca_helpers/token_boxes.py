"""One row as coloured tokens: what is prompt, answer, end of text and padding, and which of it is learned."""

from collections.abc import Iterator, Mapping, Sequence

from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Patch, Rectangle

from .data import IGNORED, RECIPES, tokenize
from .picture import BLUE, INK, ORANGE, Picture, in_style
from .prompts import encode, format_prompt

PARTS: dict[str, dict] = {  # how each part of a row looks where it is learned; else its fill is white
    "prompt": {"facecolor": "#bdbdbd", "linestyle": (0, (2, 1.5)), "linewidth": 0.8},
    "answer": {"facecolor": BLUE, "linewidth": 0.8},
    "end of text": {"facecolor": ORANGE, "linewidth": 2.2},
    "padding": {"facecolor": "white", "linewidth": 0.8, "hatch": "////"},
}
FONT = {"family": "DejaVu Sans Mono", "size": 9, "va": "center", "parse_math": False}
WIDTH = 116  # characters in a line


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
    picture, line, picture.alt = Picture(), 0, "One row as coloured tokens."
    axes = picture.add_axes((0, 0, 1, 1))
    for recipe in recipes:
        axes.text(0, line + 0.5, f"recipe {recipe}", weight="bold", **FONT)
        line, start, boxes = line + 1, 0, list(_boxes(row, tokenizer, recipe, max_length))
        for part, text, learned in boxes:
            if start + len(text) + 1 > WIDTH:
                line, start = line + 1, 0
            look = PARTS[part] if learned else {**PARTS[part], "facecolor": "white"}
            axes.add_patch(Rectangle((start, line + 0.1), len(text) + 0.8, 0.8, edgecolor=INK, **look))
            paper = {"facecolor": look["facecolor"], "edgecolor": "none", "pad": 0.5}  # no hatch behind words
            color = "white" if learned and part == "answer" else INK
            axes.text(start + 0.4, line + 0.5, text, color=color, bbox=paper, **FONT)
            start += len(text) + 1
        line += 1
        picture.alt += f" Recipe {recipe}: {sum(learned for *_, learned in boxes)} tokens are learned."
    handles = [Patch(edgecolor=INK, label=part, **look) for part, look in PARTS.items()]
    picture.legend(
        handles=handles, title="filled: learned; white: only read", alignment="left", loc="lower left", ncols=4
    )
    picture.set_size_inches(9, 0.3 * line + 0.6)
    axes.set(xlim=(-1, WIDTH + 1), ylim=(line + 2, -0.1))
    axes.axis("off")
    return picture


def _boxes(row: Mapping[str, str], tokenizer, recipe: str, max_length: int) -> Iterator[tuple[str, str, bool]]:
    """Yield each token's part, its text and whether it is learned; all padding at once."""
    made = tokenize({key: [value] for key, value in row.items()}, tokenizer, recipe, max_length)
    ids, labels = made["input_ids"][0], made["labels"][0]
    held = sum(made["attention_mask"][0]) if "attention_mask" in made else len(ids)
    asked = format_prompt(row["instruction"], row["input"] if "input" in RECIPES[recipe] else "")
    prompt = len(encode([asked], tokenizer)[0])
    drawable = get_font(findfont(FONT["family"])).get_charmap()
    for place, (id, label) in enumerate(zip(ids[:held], labels)):
        text = tokenizer.decode([id]).replace("\n", "↵").replace("\t", "→").replace(" ", "·")[: WIDTH - 1]
        text = "".join(letter if ord(letter) in drawable else "□" for letter in text)
        part = "prompt" if place < prompt else "end of text" if id == tokenizer.eos_token_id else "answer"
        yield part, part if part == "end of text" else text, label != IGNORED
    if held < len(ids):
        token = "end-of-text" if tokenizer.pad_token_id == tokenizer.eos_token_id else "padding"
        yield "padding", f"padding: {len(ids) - held} times the {token} token", False
