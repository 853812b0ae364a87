import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from alpaca_helpers import plots
from alpaca_helpers.data import tokenize
from alpaca_helpers.evaluation import METRICS

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
    sides = {"base": side(0.2, **none), "tuned": side(0.8, **none), "base_bare": side(0.1, answer_loss=None, **none)}
    return {"n": 156, "max_new_tokens": 80, **sides}


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


def pictures(tokenizer):
    return {
        "word_counts": plots.word_counts([3, 80, 81, 200], 80),
        "token_lengths": plots.token_lengths([20, 127, 128, 128], 128, {"empty answer": 7}),
        "tokens": plots.tokens(ROW, tokenizer),
        "parameters": plots.parameters(786_432, 355_609_600),
        "losses": plots.losses(LOG),
        "before_after": plots.before_after(metrics()),
        "answer_lengths": plots.answer_lengths(ANSWERS),
    }


def test_every_picture_says_what_it_shows_and_labels_its_axes(pocket_tokenizer, tmp_path):
    said = {
        "word_counts": "2 of 4 rows lie beyond it",
        "token_lengths": "2 of 4 rows reach it and are cut there. Beside it, as bars: kept 4 rows, empty answer 7 rows",
        "tokens": "One row as coloured tokens. Recipe document: ",
        "parameters": "the 354,823,168 parameters of the base model, which stay, and the 786,432 of LoRA",
        "losses": "the training loss goes from 3.00 to 1.00, the held-out loss goes from 1.50 to 1.50",
        "before_after": "answer holds the fact 20% before, 80% after",
        "answer_lengths": "base 80.0 tokens on average, 0% stop by themselves; tuned 4.0 tokens on average, 100%",
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
    pictures(pocket_tokenizer)["losses"].png()
    assert dict(matplotlib.rcParams) == before


def test_fills_differ_in_black_and_white():
    def lightness(colour):
        return np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722])

    assert abs(lightness(plots.BASE["facecolor"]) - lightness(plots.TUNED["facecolor"])) > 0.3
    assert len({look.get("hatch") for look in (plots.BASE, plots.TUNED, plots.BARE)}) == 3
    borders = {
        (look[2]["linewidth"], str(look[2].get("linestyle")), look[2].get("hatch")) for look in plots.PARTS.values()
    }
    assert len(borders) == len(plots.PARTS)


@pytest.mark.parametrize("recipe", ["document", "answers", "document+eos"])
def test_tokens_are_filled_where_the_recipe_learns(pocket_tokenizer, recipe):
    made = tokenize({key: [value] for key, value in ROW.items()}, pocket_tokenizer, recipe, 128)
    learned = sum(label != -100 for label in made["labels"][0])
    picture = plots.tokens(ROW, pocket_tokenizer, [recipe])
    boxes = [patch for patch in picture.axes[0].patches if isinstance(patch, Rectangle)]
    boxes = boxes[: -2 * len(plots.PARTS) + 1]  # the legend's: three learned, four only read
    assert sum(box.get_facecolor()[:3] != (1, 1, 1) for box in boxes) == learned
    held = sum(made["attention_mask"][0]) if "attention_mask" in made else len(made["input_ids"][0])
    assert len(boxes) == held + (recipe == "document")  # all padding is one box
    assert f"{learned} are learned" in picture.alt


def test_tokens_fit_their_lines(pocket_tokenizer):
    row = {"instruction": "word " * 60, "input": "", "output": "x" * 300}
    for patch in plots.tokens(row, pocket_tokenizer).axes[0].patches:
        assert patch.get_x() + patch.get_width() <= plots.CELLS + 1


def test_parameters_have_proportional_areas():
    base, adapter = (patch.get_width() * patch.get_height() for patch in plots.parameters(250, 1250).axes[0].patches)
    assert adapter / base == pytest.approx(250 / 1000)


def test_losses_of_a_training_without_steps():
    assert "no losses" in plots.losses([]).alt
    assert plots.losses(LOG[2:]).png()


def test_before_after_leaves_out_what_was_not_measured():
    picture = plots.before_after(metrics(contains=None, exact_match=None))
    assert [label.get_text().split("\n")[0] for label in picture.axes[0].get_yticklabels()] == [
        METRICS[name].label for name in ("stop_rate", "rouge_l", "repetition", "echo_rate")
    ]


def test_answers_table_shows_text_as_text():
    table = plots.answers_table(ANSWERS).data
    assert "What &lt;b&gt;is&lt;/b&gt; $a$?" in table and "mathjax_ignore" in table
    assert "✗ on and on …" in table and "✓ Paris.<" in table and "Say. 1 | 2" in table
    assert "x " * 79 + "x …" in table and "x " * 81 not in table
