"""The benchmarks at their smallest: the GPU's candidates, the sweep over recipes, the pretrained model."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from support import PROJECT
from support.models import save
from support.notebooks import ENGLISH, made_of, write_notebook

from alpaca_helpers import AlpacaError
from alpaca_helpers.batches import PadToLongest
from alpaca_helpers.cells import NOTEBOOKS
from alpaca_helpers.data import IGNORED, RECIPES
from alpaca_helpers.models import base_dtype
from benchmarks import real, recipes
from benchmarks.on_gpu import PARTS
from dev.gpu import graphs

pytestmark = pytest.mark.nightly


# What is to be measured on a GPU computes what the series computes


@pytest.mark.parametrize(
    "kind, shape, positions",
    [("padded_rows", (2, 16), None), ("packed_rows", (1, 1024), [0, 1, 2, 3, 4, 0, 1, 0, 0])],
)
def test_few_shapes_hold_the_same_tokens_positions_and_labels(kind, shape, positions):
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, IGNORED, 7, 8, 9]},
        {"input_ids": [4, 3], "labels": [IGNORED, 3]},
    ]
    batch = graphs.static_batch(getattr(graphs, kind), PadToLongest(1), rows)
    assert batch["input_ids"].shape == shape and len(batch["before"]) == len(batch["targets"])
    assert positions is None or batch["position_ids"][0, :9].tolist() == positions
    learned = batch["targets"] != IGNORED
    before = batch["input_ids"].flatten()[batch["before"]][learned].tolist()
    assert list(zip(before, batch["targets"][learned].tolist())) == [(6, 7), (7, 8), (8, 9), (4, 3)]


def test_every_part_for_a_gpu_runs_at_its_smallest_and_without_time_none_is_begun(tmp_path):
    def on_gpu(*options):
        command = [sys.executable, "-m", "benchmarks.on_gpu", "--out", tmp_path, *options]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)

    done = on_gpu("--limit", "0")
    assert done.returncode == 0 and [line.split(": left out")[0] for line in done.stdout.splitlines()] == list(PARTS)
    assert not list(tmp_path.iterdir())
    done = on_gpu("--rehearse")
    assert done.returncode == 0, done.stdout + "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    made = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert made.keys() == {"gradients", "race-16", "generation", "patches"}
    rounding = 2**-7 if base_dtype() == torch.bfloat16 else 1e-5
    for name, found in made["gradients"]["gradients"].items():
        assert found["loss"] < rounding and found["gradients"] < 10 * rounding, name
        assert found["different losses of four under dropout"] == 4, name
    race = made["race-16"]["training"]["pocket"]
    for name in ("graphed", "packed"):
        assert race[name]["heldout_loss"] == pytest.approx(race["ours"]["heldout_loss"], abs=0.05), name
    assert [result["differ"] for result in made["generation"]["generation"]] == [0, 0]


# The sweep over recipes, and its table


@pytest.fixture
def runs(tmp_path):
    """Finished runs' files, as the table reads them."""
    made = {"a": (0, 6.0, "answers", 10.0, 8), "b": (1, 8.0, "answers", 14.0, 8)}
    made |= {"c": (0, 80.0, "document", None, 8), "d": (0, 7.0, "answers", 10.0, 2)}
    for name, (seed, tokens, recipe, seconds, rank) in made.items():
        (tmp_path / name).mkdir()
        settings = {"lora_rank": rank, "lora_alpha": 16, "batch_size": 16, "seed": seed, "recipe": recipe}
        values = {"contains": 0.5 + seed / 10, "exact_match": None, "stop_rate": 1.0, "mean_answer_tokens": tokens}
        (tmp_path / name / "metrics.json").write_text(json.dumps({"n": 9, "recipe": recipe, "tuned": values}))
        (tmp_path / name / "manifest.json").write_text(json.dumps({"training": settings}))
        if seconds:
            cell = new_code_cell("result = trainer.train()", metadata={"papermill": {"duration": seconds}})
            notebook = new_notebook(cells=[new_code_cell("1"), cell])
            nbformat.write(notebook, tmp_path / name / "03_lora_finetuning.ipynb")
    return [tmp_path / name for name in made]


def test_table_and_picture_are_by_choice_with_mean_and_spread_over_seeds(runs, tmp_path):
    lines = recipes.summarize(runs)
    assert recipes.markdown(lines).splitlines()[2:] == [
        "| answers | 8 | 2 | 55% ± 7 | – | 100% ± 0 | 7.0 ± 1.4 | 12.0 ± 2.8 |",
        "| document | 8 | 1 | 50% | – | 100% | 80.0 | – |",
        "| answers | 2 | 1 | 50% | – | 100% | 7.0 | 10.0 |",
    ]
    axes = recipes.draw(lines, recipes.SHOWN).axes
    choices = ["answers, rank 8", "document, rank 8", "answers, rank 2"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == choices
    assert len(axes) == 3  # what was not measured in all of them is left out
    (tmp_path / "e").mkdir()
    with pytest.raises(AlpacaError, match="/e has no metrics.json"):
        recipes.summarize([*runs, tmp_path / "e"])


def test_sweep_makes_each_run_of_the_grid(tmp_path, monkeypatch):
    grid = recipes.grid()
    assert len(grid) == 3 * (6 + 5)
    assert {run["recipe"] for run in grid.values() if run["lora_rank"] == 8} == set(RECIPES)
    assert {run["lora_rank"] for run in grid.values() if run["recipe"] == "answers"} == {1, 2, 4, 8, 16, 32}
    made = []
    monkeypatch.setattr(recipes, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(recipes, "run_one", lambda *given: made.append(given))
    folders = recipes.sweep(tmp_path, grid)
    assert folders == [tmp_path / name for name in grid]
    assert sorted(made, key=str) == sorted(zip(folders, grid.values()), key=str)


def test_a_run_executes_the_notebooks_after_the_first_is_not_repeated_and_names_its_log(tmp_path, monkeypatch):
    paths = [tmp_path / f"0{number}_x.ipynb" for number in (1, 2, 3)]
    for path in paths:
        source = f"print(open(run + '/seen', 'a').write('{path.stem} {{}};'.format(seed)))"
        write_notebook(path, 'run: str = ""\nseed: int = 0', source)
    monkeypatch.setattr(recipes, "NOTEBOOKS", paths)
    monkeypatch.setattr(recipes, "SETTINGS", {"profile": "pocket"})
    for seed in (5, 5, 6):
        recipes.run_one(tmp_path / "r", {"seed": seed})
    assert (tmp_path / "r" / "seen").read_text() == "02_x 5;03_x 5;02_x 6;03_x 6;"
    with pytest.raises(AlpacaError, match=r"The run x failed .*/x.log"):
        recipes.run_one(tmp_path / "x", {"no_such_parameter": 1})


# Both recipes on a pretrained model, here a tiny one in its place


def test_both_recipes_run_are_asked_the_same_and_are_kept(tmp_path, capfd):
    model, rows, out = save("llama", tmp_path / "model"), tmp_path / "rows.json", tmp_path / "runs"
    rows.write_text(json.dumps(made_of(ENGLISH, 30)), encoding="utf-8")
    settings = {"profile": "pocket", "dataset_name": str(rows), "num_train_epochs": 1}
    settings |= {"heldout_rows": 6, "max_heldout_rows": 6}
    results = real.run(out, model, real.RECIPES, settings)
    assert list(results) == ["document", "answers"]
    document, answers = results.values()
    assert document["base"] == answers["base"]  # the base, asked the same
    assert [(result["n"], result["checkable"]["n"]) for result in results.values()] == [(6, 6)] * 2
    head, _, losses, *lines = real.table(results).splitlines()
    assert head == "|  | base | document | answers |" and {line.count("|") for line in lines} == {5}
    for name, cell in zip(results, losses.split("|")[3:]):
        assert abs(float(cell.split()[0]) - results[name]["tuned"]["answer_loss"]) < 0.01
    said = real.answers({name: out / name for name in real.RECIPES}, number=3)
    assert {said.count(f"\n{head}") for head in ("**", "- expected: ", "- base: ", "- answers: ")} == {3}
    capfd.readouterr()
    assert real.run(out, model, real.RECIPES, settings) == results
    printed = capfd.readouterr()
    assert printed.out.count("unchanged") == 8 and "evaluating" not in printed.err
    cells = nbformat.read(out / "answers" / NOTEBOOKS[3].name, as_version=4).cells
    tables = str([output.get("data", {}).get("text/html") for cell in cells for output in cell.get("outputs", [])])
    assert re.findall("tuned, ([a-z]+ [a-z]+)<", tables) == ["recipe answers", "run document"]  # beside one another


def test_without_the_package_of_the_model_it_says_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "PACKAGE", "no-such-package")
    with pytest.raises(AlpacaError, match="make real"):
        real.dequantized(tmp_path / "model")
    assert not (tmp_path / "model").exists()
