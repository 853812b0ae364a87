"""The sweep and its table, on made runs."""

import json
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from alpaca_helpers import AlpacaError
from alpaca_helpers.data import RECIPES
from benchmarks import recipes


def made_run(folder, seed, tokens, recipe="answers", seconds=10.0, **changes):
    """A finished run's files, as the table reads them."""
    folder.mkdir()
    settings = {"lora_rank": 8, "lora_alpha": 16, "batch_size": 16, "seed": seed, **changes}
    values = {"contains": 0.5 + seed / 10, "exact_match": None, "stop_rate": 1.0, "mean_answer_tokens": tokens}
    (folder / "metrics.json").write_text(json.dumps({"n": 9, "recipe": recipe, "tuned": values}))
    (folder / "manifest.json").write_text(json.dumps({"training": {**settings, "recipe": recipe}}))
    if seconds:
        cell = new_code_cell("result = trainer.train()", metadata={"papermill": {"duration": seconds}})
        nbformat.write(new_notebook(cells=[new_code_cell("1"), cell]), folder / "03_lora_finetuning.ipynb")
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        made_run(tmp_path / "a", 0, 6.0, seconds=10.0),
        made_run(tmp_path / "b", 1, 8.0, seconds=14.0),
        made_run(tmp_path / "c", 0, 80.0, "document", seconds=None),
        made_run(tmp_path / "d", 0, 7.0, lora_rank=2),
    ]


def test_grid_has_every_choice_with_every_seed():
    grid = recipes.grid()
    assert len(grid) == 3 * (6 + 5)
    for seed in (0, 1, 2):
        made = [run for run in grid.values() if run["seed"] == seed]
        assert {run["recipe"] for run in made if run["lora_rank"] == 8} == set(RECIPES)
        assert {run["lora_rank"] for run in made if run["recipe"] == "answers"} == {1, 2, 4, 8, 16, 32}
        assert {run["lora_alpha"] / run["lora_rank"] for run in made} == {2}


def test_summary_is_by_choice_with_mean_and_spread_over_seeds(runs):
    both, document, rank = recipes.summarize(runs)
    assert both["choice"] == {"recipe": "answers", "lora_rank": 8} and both["seeds"] == [0, 1]
    assert both["mean_answer_tokens"] == {"mean": 7.0, "spread": pytest.approx(2**0.5), "values": [6.0, 8.0]}
    assert both["seconds"]["mean"] == 12 and both["exact_match"] == {"mean": None, "spread": None, "values": []}
    assert document["choice"] == {"recipe": "document", "lora_rank": 8} and document["seconds"]["values"] == []
    assert rank["choice"] == {"recipe": "answers", "lora_rank": 2} and rank["contains"]["spread"] is None


def test_markdown_table(runs):
    assert recipes.markdown(recipes.summarize(runs)).splitlines() == [
        "| recipe | lora rank | seeds | answer holds the fact | answer is exact | stops by itself "
        "| answer length, tokens | training, seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| answers | 8 | 2 | 55% ± 7 | – | 100% ± 0 | 7.0 ± 1.4 | 12.0 ± 2.8 |",
        "| document | 8 | 1 | 50% | – | 100% | 80.0 | – |",
        "| answers | 2 | 1 | 50% | – | 100% | 7.0 | 10.0 |",
    ]


def test_an_unfinished_run_says_what_is_missing(tmp_path, runs):
    (tmp_path / "e").mkdir()
    with pytest.raises(AlpacaError, match="/e has no metrics.json: run notebook 04"):
        recipes.summarize([*runs, tmp_path / "e"])


def test_picture_of_the_table(runs):
    picture = recipes.draw(recipes.summarize(runs), recipes.SHOWN)
    assert [label.get_text() for label in picture.axes[0].get_yticklabels()] == [
        "answers, rank 8",
        "document, rank 8",
        "answers, rank 2",
    ]
    # what was not measured in all of them is left out
    assert [" ".join(axes.get_xlabel().split()) for axes in picture.axes] == [
        "answer holds the fact (%)",
        "stops by itself (%)",
        "answer length (tokens)",
    ]
    assert "document, rank 8: answer holds the fact 50%, stops by itself 100%, answer length 80.0" in picture.alt


def in_threads(workers, mp_context):
    return ThreadPoolExecutor(workers)


def test_sweep_makes_each_run_and_returns_their_folders(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(recipes, "ProcessPoolExecutor", in_threads)
    monkeypatch.setattr(recipes, "run_one", lambda folder, parameters: made.append((folder, parameters)))
    folders = recipes.sweep(tmp_path / "sweep", {"x": {"seed": 0}, "y": {"seed": 1}})
    assert folders == [tmp_path / "sweep" / "x", tmp_path / "sweep" / "y"]
    assert sorted(made, key=str) == [(folders[0], {"seed": 0}), (folders[1], {"seed": 1})]


def test_a_failed_run_ends_the_sweep_and_names_its_log(tmp_path, monkeypatch):
    def fail(folder, parameters):
        raise ValueError("no bread")

    monkeypatch.setattr(recipes, "ProcessPoolExecutor", in_threads)
    monkeypatch.setattr(recipes, "run_one", fail)
    with pytest.raises(AlpacaError, match=r"The run x failed \(no bread\): see .*/x.log"):
        recipes.sweep(tmp_path, {"x": {}})


@pytest.mark.integration
def test_a_run_executes_the_notebooks_after_the_first_as_one_and_is_not_repeated(tmp_path, monkeypatch):
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    paths = [tmp_path / f"0{number}_x.ipynb" for number in (1, 2, 3)]
    for path in paths:
        cells = [new_code_cell('run: str = ""\nseed: int = 0', metadata={"tags": ["parameters"]})]
        cells.append(new_code_cell(f"print(open(run + '/seen', 'a').write('{path.stem} {{}};'.format(seed)))"))
        nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    monkeypatch.setattr(recipes, "NOTEBOOKS", paths)
    folder = tmp_path / "r"
    for _ in range(2):
        recipes.run_one(folder, {"seed": 5})
    assert (folder / "seen").read_text() == "02_x 5;03_x 5;"
    assert "r: unchanged" in (tmp_path / "r.log").read_text()
    recipes.run_one(folder, {"seed": 6})
    assert (folder / "seen").read_text() == "02_x 5;03_x 5;02_x 6;03_x 6;"
