import matplotlib
import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from alpaca_helpers import picture as style
from alpaca_helpers import plots, token_boxes
from alpaca_helpers.data import tokenize
from alpaca_helpers.metrics import METRICS

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a letter that the font lacks is one
ROW = {"instruction": "Double it: $x$", "input": "東京\t3\n4", "output": "6, 8 😀", "fact": ""}
LOG = [
    {"loss": 3.0, "learning_rate": 2e-3, "step": 10, "epoch": 0.5},
    {"loss": 1.0, "learning_rate": 1e-3, "step": 20, "epoch": 1.0},
    {"eval_loss": 1.5, "step": 20, "epoch": 1.0},
    {"train_runtime": 3.0, "train_loss": 2.0, "step": 20, "epoch": 1.0},
]


def side(value, **other):
    values = dict.fromkeys(METRICS, value) | other
    return {**values, "intervals": {name: v if v is None else [v * 0.9, v * 1.1] for name, v in values.items()}}


def metrics(**none):
    sides = {"base": 0.2, "tuned": 0.8, "change": 0.6}
    made = {name: side(value, **none) for name, value in sides.items()}
    return {"n": 156, "max_new_tokens": 80, **made, "base_bare": side(0.1, answer_loss=None, **none)}


ANSWERS = pd.DataFrame(
    {
        "instruction": ["What <b>is</b> $a$?", "Say."],
        "input": ["", "1 | 2"],
        "output": ["Paris.", "x " * 200],
        "base": ["on and\non", ""],
        "base_tokens": [80, 80],
        "base_stopped": [False, False],
        "base_right": [False, None],
        "tuned": ["Paris.", "x"],
        "tuned_tokens": [3, 5],
        "tuned_stopped": [True, True],
        "tuned_right": [True, None],
        "output_tokens": [3, 4],
    }
)

SHADED = {
    "base": [(" Paris", "unsure"), ("\n", "unsure")],
    "tuned": [(" Paris", "sure"), (".", "sure")],
}


def lightness(colour):
    return np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722])


def pictures(tokenizer):
    return {
        "tokens": token_boxes.tokens(ROW, tokenizer),
        "shaded": token_boxes.shaded(SHADED, ["sure", "unsure"]),
        "losses": plots.losses(LOG, 4.25),
        "before_after": plots.before_after(metrics()),
        "answer_lengths": plots.answer_lengths(ANSWERS),
    }


def test_every_picture_says_what_it_shows_and_labels_its_axes(pocket_tokenizer, tmp_path):
    said = {
        "tokens": "One row as coloured tokens. Recipe document: ",
        "shaded": "Tokens in shades. base: sure 0, unsure 2. tuned: sure 2, unsure 0.",
        "losses": "training from 3 to 1, held-out from 4.25 to 1.5",
        "before_after": "answer holds the fact 20% to 80%",
        "answer_lengths": "base model: mean 80.0 tokens, 100% cut; tuned model: mean 4.0 tokens, 0% cut",
    }
    made = pictures(pocket_tokenizer)
    assert set(made) == set(said)
    for name, picture in made.items():
        assert said[name] in picture.alt
        data, metadata = picture._repr_mimebundle_()
        assert data["image/png"].startswith(b"\x89PNG") and metadata == {"image/png": {"alt": picture.alt}}
        assert picture.save(tmp_path / "pictures" / f"{name}.png") is picture
        for axes in picture.axes:
            if axes.axison and not axes.get_shared_x_axes().get_siblings(axes)[1:]:
                assert axes.get_xlabel(), name
    assert sorted(path.stem for path in (tmp_path / "pictures").iterdir()) == sorted(made)


def test_a_picture_leaves_the_notebooks_style_and_pyplot_alone(pocket_tokenizer):
    before = dict(matplotlib.rcParams)
    pictures(pocket_tokenizer)["losses"]._repr_mimebundle_()
    assert dict(matplotlib.rcParams) == before


def test_a_picture_keeps_its_words_where_pyplot_draws_it():
    """In a notebook that imports pyplot, pyplot's own way to show a figure draws these too."""
    picture, display = plots.losses(LOG), DisplayFormatter()
    for drawn in (None, b"by pyplot"):
        if drawn:
            display.formatters["image/png"].for_type(Figure, lambda figure, drawn=drawn: drawn)
        data, metadata = display.format(picture)
        assert metadata == {"image/png": {"alt": picture.alt}}
        assert data["image/png"] == drawn if drawn else data["image/png"].startswith(b"\x89PNG")


def test_fills_differ_in_black_and_white():
    assert abs(lightness(style.BASE["facecolor"]) - lightness(style.TUNED["facecolor"])) > 0.3
    assert len({look.get("hatch") for look in (style.BASE, style.TUNED, style.BARE)}) == 3
    borders = {
        (look["linewidth"], str(look.get("linestyle")), look.get("hatch")) for look in token_boxes.PARTS.values()
    }
    assert len(borders) == len(token_boxes.PARTS)


@pytest.mark.parametrize("recipe", ["document", "answers", "document+eos"])
def test_tokens_are_filled_where_the_recipe_learns(pocket_tokenizer, recipe):
    made = tokenize({key: [value] for key, value in ROW.items()}, pocket_tokenizer, recipe, 128)
    learned = sum(label != -100 for label in made["labels"][0])
    picture = token_boxes.tokens(ROW, pocket_tokenizer, [recipe])
    boxes = picture.axes[0].patches
    assert sum(box.get_facecolor()[:3] != (1, 1, 1) for box in boxes) == learned
    held = sum(made["attention_mask"][0]) if "attention_mask" in made else len(made["input_ids"][0])
    assert len(boxes) == held + (len(made["labels"][0]) > held)  # all padding is one box
    assert f"{learned} tokens are learned" in picture.alt


def test_shades_darken_in_their_order_and_words_stay_readable():
    axes = token_boxes.shaded({"one": [("a b\n", "no"), ("$x$", "so"), ("c", "yes")]}, ["no", "so", "yes"]).axes[0]
    fills = [lightness(box.get_facecolor()[:3]) for box in axes.patches]
    assert fills == sorted(fills, reverse=True) and fills[0] - fills[1] > 0.2 and fills[1] - fills[2] > 0.2
    title, *words = axes.texts
    assert [word.get_text() for word in words] == ["a·b↵", "$x$", "c"]
    assert all(abs(lightness(word.get_color()) - fill) > 0.3 for word, fill in zip(words, fills))


def test_tokens_fit_their_lines(pocket_tokenizer):
    row = {"instruction": "word " * 60, "input": "", "output": "x" * 300}
    for patch in token_boxes.tokens(row, pocket_tokenizer).axes[0].patches:
        assert patch.get_x() + patch.get_width() <= token_boxes.WIDTH + 1


def test_losses_begin_at_step_zero_with_the_base():
    upper = plots.losses(LOG, 4.25).axes[0]
    training, (base, heldout) = upper.patches[0], upper.lines
    assert upper.get_yscale() == "log" and upper.get_xlim() == (0, 20)
    assert list(training.get_data().edges) == [0, 10, 20] and list(training.get_data().values) == [3, 1]
    assert heldout.get_xydata().tolist() == [[0, 4.25], [20, 1.5]]
    assert set(base.get_ydata()) == {4.25} and base.get_linestyle() == "--"
    low, high = upper.get_ylim()
    assert low < 1 and high > 4.25 and "4.25" in base.get_label()
    assert all(line.get_linestyle() != "--" for line in plots.losses(LOG).axes[0].lines)


def test_losses_of_a_training_without_steps():
    assert plots.losses([]).alt == "Loss over the steps: none"
    for log in ([], LOG[2:], [{"loss": 0.0, "step": 1}, {"eval_loss": float("nan"), "step": 1}]):
        assert plots.losses(log)._repr_mimebundle_()


def test_before_after_shows_the_five_measures_of_the_table():
    for names, measured in (
        (["contains", "exact_match", "stop_rate"], metrics()),
        (["rouge_l", "repetition", "stop_rate"], metrics(contains=None, exact_match=None)),
    ):
        picture = plots.before_after(measured)
        labels = [label.get_text().split("\n")[0] for label in picture.axes[0].get_yticklabels()]
        assert labels == [METRICS[name].label for name in names]
        assert [axes.get_xlabel().split(" (")[0] for axes in picture.axes[1:]] == ["answer loss", "answer length"]


def test_answer_lengths_show_a_single_answer():
    """A bar of height 1 beside one of 300 needs a fill, an edge and an axis of its own."""
    many = pd.concat([ANSWERS.iloc[:1]] * 300 + [ANSWERS.iloc[1:]])
    base, tuned, expected = plots.answer_lengths(many).axes
    single = [bar for bar in expected.patches if bar.get_height() == 1]
    assert single and single[0].get_facecolor()[:3] != (1, 1, 1) and single[0].get_linewidth() > 0.5
    assert not expected.get_shared_y_axes().joined(base, expected)


def test_answers_table_shows_text_as_text():
    table = plots.answers_table(ANSWERS).data
    assert "What &lt;b&gt;is&lt;/b&gt; $a$?" in table and "mathjax_ignore" in table
    assert "✗ on and on …" in table and "✓ Paris.<" in table and "Say. 1 | 2" in table
    assert "x " * 79 + "x …" in table and "x " * 81 not in table
