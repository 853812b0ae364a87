"""The benchmark on a pretrained model, on a tiny one in its place: `python -m pytest tests/test_real.py`."""

import json
import re

import nbformat
import pytest
from support.models import save
from support.notebooks import ENGLISH, made_of

from alpaca_helpers import AlpacaError
from alpaca_helpers.series import NOTEBOOKS
from benchmarks import real

pytestmark = pytest.mark.integration


def test_both_recipes_run_are_asked_the_same_and_are_kept(tmp_path, capfd):
    model, rows, out = save("llama", tmp_path / "model"), tmp_path / "rows.json", tmp_path / "runs"
    rows.write_text(json.dumps(made_of(ENGLISH, 30)), encoding="utf-8")
    settings = {
        "profile": "pocket",
        "dataset": str(rows),
        "heldout_rows": 6,
        "max_heldout_rows": 6,
        "num_train_epochs": 1,
    }
    results = real.run(out, model, real.RECIPES, settings)
    assert list(results) == ["document", "answers"]
    before = [result["base"] for result in results.values()]
    assert before[0] == before[1]  # the base, asked the same
    assert [(result["n"], result["checkable"]["n"]) for result in results.values()] == [(6, 6)] * 2

    lines = real.table(results).splitlines()
    assert lines[0] == "|  | base | document | answers |" and len(lines) == 2 + 5 + 3
    assert all(line.count("|") == 5 for line in lines)
    for place, name in enumerate(real.RECIPES, 3):
        loss = results[name]["tuned"]["answer_loss"]
        value = float(lines[2].split("|")[place].split()[0])
        assert abs(value - loss) < 0.01

    said = real.answers({name: out / name for name in real.RECIPES}, number=3)
    assert (
        said.count("\n**")
        == 3
        == said.count("\n- expected: ")
        == said.count("\n- base: ")
        == said.count("\n- answers: ")
    )

    capfd.readouterr()
    assert real.run(out, model, real.RECIPES, settings) == results
    printed = capfd.readouterr()
    assert printed.out.count("unchanged") == 8 and "evaluating" not in printed.err

    cells = {cell.id: cell for cell in nbformat.read(out / "answers" / NOTEBOOKS[3].name, as_version=4).cells}
    contenders = cells["04-47"].outputs[-1]["data"]["text/html"]
    assert re.findall("tuned, recipe ([a-z]+)<", contenders) == ["document", "answers"]


def test_without_the_package_it_says_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "PACKAGE", "no-such-package")
    with pytest.raises(AlpacaError, match="`make real` installs it"):
        real.dequantized(tmp_path / "model")
    assert not (tmp_path / "model").exists()
