"""Pictures: what they show and say, in any letters, in black and white, and without touching the notebook's style."""

import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from alpaca_helpers.data import tokenize
from alpaca_helpers.metrics import METRICS
from alpaca_lessons import pictures, plots, token_boxes

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a letter that the font lacks is one
ROW = {"instruction": "Double it: $x$", "input": "東京\t3\n4", "output": "6, 8 😀", "fact": ""}
STEPS = [{"loss": 3.0, "learning_rate": 2e-3, "step": 10}, {"loss": 1.0, "learning_rate": 1e-3, "step": 20}]
LOG = [*STEPS, {"eval_loss": 1.5, "step": 20}, {"train_runtime": 3.0, "train_loss": 2.0, "step": 20}]
SHADED = {"base": [(" Paris", "unsure"), ("\n", "unsure")], "tuned": [(" Paris", "sure"), (".", "sure")]}
NEXT = {"base": torch.eye(2048)[[3, 4, 5]], "tuned": torch.eye(2048)[[3, 4, 0]]}  # after the prompt and two tokens
OF_A_SIDE = [side + about for side in ("base", "tuned") for about in ("", "_tokens", "_stopped", "_right")]
ASKED = [
    ["What <b>is</b> $a$?", "", "Paris.", 3, "on and\non", 80, False, False, "Paris.", 3, True, True],
    ["Say.", "1 | 2", "x " * 200, 4, "", 80, False, None, "x", 5, True, None],
]
ANSWERS = pd.DataFrame(ASKED, columns=["instruction", "input", "output", "output_tokens", *OF_A_SIDE])


def metrics(**none):
    def side(value, **other):
        values = dict.fromkeys(METRICS, value) | other | none
        return {**values, "intervals": {name: v if v is None else [v * 0.9, v * 1.1] for name, v in values.items()}}

    sides = {"base": side(0.2), "tuned": side(0.8), "change": side(0.6), "base_bare": side(0.1, answer_loss=None)}
    return {"n": 156, "max_new_tokens": 80, **sides}


def lightness(colour):
    return np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722])


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a picture by a function that saves it; returns the figure and what the notebook shows."""
    figures, savefig = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(function, *args, **kwargs):
        shown = function(*args, path=tmp_path / "pictures" / "a.png", **kwargs)
        assert (tmp_path / "pictures" / "a.png").read_bytes() == shown.data
        return figures.pop(), shown

    return draw


PICTURES = {  # how each is made, from the tokenizer; and some of what it says
    "tokens": (lambda words: (token_boxes.tokens, ROW, words, 128), "Recipe document: "),
    "shaded": (lambda _: (token_boxes.shaded, SHADED, ["sure", "unsure"], "how sure"), "tuned: sure 2, unsure 0"),
    "losses": (lambda _: (pictures.losses, LOG, 4.25), "training from 3 to 1, held-out from 4.25 to 1.5"),
    "no losses": (lambda _: (pictures.losses, [], 4.25), "held-out from 4.25 to 4.25"),
    "no loss left": (lambda _: (pictures.losses, [{"loss": 0.0, "step": 1}, {"eval_loss": math.nan}], 4.25), "from 0"),
    "next_tokens": (lambda words: (pictures.next_tokens, words, [5, 6], NEXT), "'base': '0.00', 'tuned': '1.00'"),
    "before_after": (lambda _: (pictures.before_after, metrics()), "answer holds the fact 20% to 80%"),
    "no facts": (lambda _: (pictures.before_after, metrics(contains=None, exact_match=None)), "ROUGE-L 20% to 80%, r"),
    "answer_lengths": (lambda _: (pictures.answer_lengths, ANSWERS, 80), "tuned model: mean 4.0 tokens, 0% cut"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_says_what_it_shows_labels_its_axes_and_leaves_the_style_alone(name, pocket_tokenizer, draw):
    make, said = PICTURES[name]
    before = dict(matplotlib.rcParams)
    figure, shown = draw(*make(pocket_tokenizer))
    data, metadata = DisplayFormatter().format(shown)
    assert said in shown.metadata["alt"] and metadata == {"image/png": shown.metadata}
    assert data["image/png"] and shown.data.startswith(b"\x89PNG")
    for axes in figure.axes:
        if axes.axison and not axes.get_shared_x_axes().get_siblings(axes)[1:]:
            assert axes.get_xlabel(), name
    assert dict(matplotlib.rcParams) == before


def test_a_figure_of_pyplots_is_shown_once(tmp_path):
    figure = plt.figure()
    assert plots.save_picture(figure, tmp_path / "a.png", "nothing").metadata == {"alt": "nothing"}
    assert plt.get_fignums() == []


def test_fills_differ_in_black_and_white():
    assert abs(lightness(plots.BASE["facecolor"]) - lightness(plots.TUNED["facecolor"])) > 0.3
    assert len({look.get("hatch") for look in (plots.BASE, plots.TUNED, pictures.BARE)}) == 3
    parts = token_boxes.PARTS.values()
    assert len({(look["linewidth"], str(look.get("linestyle")), look.get("hatch")) for look in parts}) == len(parts)


@pytest.mark.parametrize("recipe", ["document", "answers", "document+eos"])
def test_tokens_are_filled_where_the_recipe_learns_and_fit_their_lines(pocket_tokenizer, recipe, draw):
    row = ROW | {"output": f"{ROW['output']} {'word ' * 20}{'x' * 40}"}
    made = tokenize({key: [value] for key, value in row.items()}, pocket_tokenizer, recipe, 128)
    learned = sum(label != -100 for label in made["labels"][0][1:])  # nothing stands before the first
    figure, shown = draw(token_boxes.tokens, row, pocket_tokenizer, 128, recipes=[recipe])
    boxes = figure.axes[0].patches
    assert sum(box.get_facecolor()[:3] != (1, 1, 1) for box in boxes) == learned
    held = sum(made["attention_mask"][0]) if "attention_mask" in made else len(made["input_ids"][0])
    assert len(boxes) == held + (len(made["labels"][0]) > held)  # all padding is one box
    assert f"{learned} tokens are learned" in shown.metadata["alt"]
    assert max(box.get_x() + box.get_width() for box in boxes) <= token_boxes.WIDTH + 1
    assert len({box.get_y() for box in boxes}) > 1


def test_shades_darken_in_their_order_and_words_stay_readable(draw):
    lines = {"one": [("a b\n", "no"), ("$x$", "so"), ("c", "yes")]}
    figure, _ = draw(token_boxes.shaded, lines, ["no", "so", "yes"], "what it is")
    (axes,) = figure.axes
    fills = [lightness(box.get_facecolor()[:3]) for box in axes.patches]
    assert fills == sorted(fills, reverse=True) and fills[0] - fills[1] > 0.2 and fills[1] - fills[2] > 0.2
    _, *words = axes.texts
    assert [word.get_text() for word in words] == ["a·b↵", "$x$", "c"]
    assert all(abs(lightness(word.get_color()) - fill) > 0.3 for word, fill in zip(words, fills))


def test_losses_begin_at_step_zero_with_the_base(draw):
    figure, _ = draw(pictures.losses, LOG, 4.25)
    (upper,) = figure.axes
    training, (base, heldout) = upper.patches[0], upper.lines
    assert upper.get_yscale() == "log" and upper.get_xlim() == (0, 20)
    assert list(training.get_data().edges) == [0, 10, 20] and list(training.get_data().values) == [3, 1]
    assert heldout.get_xydata().tolist() == [[0, 4.25], [20, 1.5]]
    assert set(base.get_ydata()) == {4.25} and base.get_linestyle() == "--" and "4.25" in base.get_label()
    low, high = upper.get_ylim()
    assert low < 1 and high > 4.25


def test_answer_lengths_show_a_single_answer_beside_300(draw):
    many = pd.concat([ANSWERS.iloc[:1]] * 300 + [ANSWERS.iloc[1:]])
    figure, _ = draw(pictures.answer_lengths, many, 80)
    base, _, expected = figure.axes
    single = [bar for bar in expected.patches if bar.get_height() == 1]
    assert single and single[0].get_facecolor()[:3] != (1, 1, 1) and single[0].get_linewidth() > 0.5
    assert not expected.get_shared_y_axes().joined(base, expected)


def test_the_answers_table_shows_text_as_text():
    table = plots.answers_table(ANSWERS).data
    assert "What &lt;b&gt;is&lt;/b&gt; $a$?" in table and "mathjax_ignore" in table
    assert "✗ on and on …" in table and "✓ Paris.<" in table and "Say. 1 | 2" in table
    assert "x " * 79 + "x …" in table and "x " * 81 not in table
