"""The four notebooks on rows of every shape: `python -m pytest tests/test_any_rows.py`.

Their cells are executed in this process, one after the other, with the parameters set as papermill sets them.
"""

import json
import warnings

import matplotlib
import pytest
from matplotlib import pyplot as plt
from support import PROJECT
from support.notebooks import ENGLISH, execute, made_of

from alpaca_helpers import AlpacaError
from alpaca_helpers.runs import read_metrics
from alpaca_helpers.series import NOTEBOOKS

pytestmark = pytest.mark.integration

SHORT = {"profile": "pocket", "num_train_epochs": 2, "max_new_tokens": 16, "max_heldout_rows": 6}


@pytest.fixture
def series(tmp_path, monkeypatch):
    """Runs the notebooks on rows, and returns the run's metrics."""
    monkeypatch.chdir(PROJECT)
    matplotlib.use("agg")

    def run(rows=None, **parameters):
        if rows is not None:
            (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
            parameters["dataset"] = str(tmp_path / "rows.json")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for notebook in NOTEBOOKS:
                execute(notebook, SHORT | parameters | {"run": str(tmp_path / "run")})
                plt.close("all")
        return read_metrics(tmp_path / "run")

    return run


SHAPES = {
    "no-input": made_of(ENGLISH, 8),
    "empty-input": made_of(ENGLISH, input=""),
    "question-in-input": [{"instruction": "", "input": q, "output": a} for q, a in ENGLISH * 2],
    "two": made_of(ENGLISH, 1)[:2],
    "three": made_of(ENGLISH, 1),
    "five": made_of(ENGLISH, 2)[:5],
    "chinese": made_of([("中国的首都是哪里？", "北京是中国的首都。"), ("说出一种水果。", "苹果。")], input="请回答"),
    "arabic": made_of([("ما هي عاصمة مصر؟", "عاصمة مصر هي القاهرة."), ("اذكر فاكهة", "تفاح")]),
    "vietnamese": made_of([("Thủ đô của Việt Nam là gì?", "Thủ đô là Hà Nội."), ("Kể tên một loại quả.", "Quả táo.")]),
    "hindi": made_of([("भारत की राजधानी क्या है?", "भारत की राजधानी नई दिल्ली है।"), ("एक फल का नाम बताओ।", "सेब।")]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_go_through_all_four(shape, series, capsys):
    metrics = series(SHAPES[shape])
    assert metrics["n"] >= 1 and metrics["tuned"]["answer_loss"] > 0
    said = capsys.readouterr().out
    assert "read = not used + train + held out: True" in said
    with_input = len(SHAPES[shape]) if shape == "chinese" else 0
    assert f"{with_input} of {len(SHAPES[shape])} rows have an input" in said
    assert "questions on both sides: 0" in said and "the same as by hand: False" not in said


@pytest.mark.parametrize("recipe", ["document", "document+eos", "answers"])
def test_a_few_of_the_shipped_rows_go_through_with_every_recipe(recipe, series):
    assert series(recipe=recipe, max_train_rows=4, lora_rank="2", resume="no")["recipe"] == recipe


@pytest.mark.parametrize(
    "rows",
    {
        "one question": [{"instruction": "Who?", "output": f"{n}."} for n in range(9)],
        "all alike": [{"instruction": "Who?", "output": "Me."}] * 9,
        "one row": made_of(ENGLISH, 1)[:1],
        "no room": [{"instruction": f"{n} " + "word " * 400, "output": "A."} for n in range(9)],
        "all too long": [{"instruction": f"{n}", "output": "word " * 100} for n in range(9)],
    }.values(),
)
def test_rows_that_leave_nothing_are_one_sentence_in_notebook_02(rows, series, tmp_path):
    with pytest.raises(AlpacaError) as refused:
        series(rows)
    assert refused.value.code == "too-few-rows" and not (tmp_path / "run" / "data").exists()
