"""The batch driver, on two small notebooks made here."""

import json
import re
import shutil

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from support import PROJECT
from support.runs import locked_elsewhere

from alpaca_helpers import AlpacaError, series
from alpaca_helpers.profiles import PROFILES
from alpaca_helpers.runs import read_manifest
from tools import notebooks as authors

FIRST = 'push_to: str = "o/a"  # a word\nrun: str = ""  # the run\nmerged: bool = False  # whether to fail'
SECOND = """from pathlib import Path

folder = Path(run) if "/" in run else Path("runs") / run
open(folder / "seen", "a").write(push_to[-1])
if merged:
    raise ValueError("the bread is burnt")
print(push_to)"""


def write(path, *sources):
    cells = [new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    paths = [tmp_path / "01_one.ipynb", tmp_path / "02_two.ipynb"]
    for path in paths:
        write(path, FIRST, SECOND)
    for module in (series, authors):
        monkeypatch.setattr(module, "NOTEBOOKS", paths)
    return paths


def seen(folder):
    return (folder / "seen").read_text()


@pytest.mark.integration
def test_only_what_changed_is_executed_again(notebooks, tmp_path, capsys):
    parameters = {"run": str(tmp_path / "r"), "push_to": "o/a"}
    folder = series.run_series(parameters)
    assert seen(folder) == "aa"
    told = capsys.readouterr().out
    assert told.count(" s; the longest cells: ") == 2 and "0 s print(push_to)" in told
    series.run_series(parameters)
    assert seen(folder) == "aa" and "longest" not in capsys.readouterr().out
    write(notebooks[1], FIRST, SECOND + "  # changed")
    series.run_series(parameters)
    assert seen(folder) == "aaa"
    series.run_series({**parameters, "push_to": "o/b"})
    assert seen(folder) == "aaabb"
    series.run_series(parameters)  # the run was remade since
    assert seen(folder) == "aaabbaa"


@pytest.mark.integration
def test_other_rows_under_the_same_name_and_what_is_missing_are_made_again(notebooks, tmp_path, monkeypatch):
    rows, folder = tmp_path / "rows.json", tmp_path / "r"
    rows.write_text("[1]")
    write(notebooks[0], FIRST + '\ndataset: str = ""', SECOND)
    monkeypatch.setattr(series, "PRODUCERS", {"seen": "02_two"})
    parameters = {"run": str(folder), "dataset": str(rows)}
    for _ in range(2):
        series.run_series(parameters)
    assert seen(folder) == "aa"
    rows.write_text("[2]")
    series.run_series(parameters)
    assert seen(folder) == "aaaa"
    (folder / "seen").unlink()
    series.run_series(parameters)
    assert seen(folder) == "a"


@pytest.mark.integration
def test_a_failed_cell_is_its_sentence_and_its_notebook_is_not_done(notebooks, tmp_path):
    parameters = {"run": str(tmp_path / "r"), "merged": True}
    with pytest.raises(AlpacaError, match="ValueError: the bread is burnt .*01_one.ipynb"):
        series.run_series(parameters)
    assert read_manifest(tmp_path / "r")["notebooks"] == {}
    series.run_series({**parameters, "merged": False})
    assert seen(tmp_path / "r") == "aaa"


def test_a_bad_parameter_is_refused_before_anything_is_made(notebooks, tmp_path):
    for name, value, code in (("wrod", "x", "unknown-parameter"), ("seed", "x", "bad-parameter")):
        with pytest.raises(AlpacaError) as refused:
            series.run_series({"run": str(tmp_path / "r"), name: value})
        assert refused.value.code == code and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "text, value", [("3", "3"), ('["a", "b"]', ["a", "b"]), ("None", None), ("null", None), ("[a", "[a"), ("", "")]
)
def test_values_of_the_command_line(text, value):
    assert series._value(text) == value


@pytest.mark.integration
@pytest.mark.parametrize("run, name", [("", "pocket"), (None, "pocket"), (0, "0"), ("mine", "mine")])
def test_the_run_has_one_name_for_batch_and_notebooks(notebooks, run, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = series.run_series({"run": run, "profile": "pocket"})
    assert folder == tmp_path / "runs" / name and seen(folder) == "aa"
    assert {path.name for path in folder.glob("*.ipynb")} == {"01_one.ipynb", "02_two.ipynb"}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]


@pytest.mark.integration
def test_what_was_damaged_since_is_made_again(notebooks, tmp_path, monkeypatch):
    code = (
        SECOND
        + """
from alpaca_helpers.files import atomic_folder
with atomic_folder(folder / "data") as part:
    (part / "train").mkdir()
    (part / "train" / "rows").write_text("rows")
"""
    )
    write(notebooks[0], FIRST, code)
    monkeypatch.setattr(series, "PRODUCERS", {"data": "01_one"})
    parameters = {"run": str(tmp_path / "r")}
    folder = series.run_series(parameters)
    rows = folder / "data" / "train" / "rows"
    for times, damage in enumerate(
        (lambda: rows.write_text("rwos"), rows.unlink, lambda: shutil.rmtree(rows.parent)), 2
    ):
        damage()
        series.run_series(parameters)
        assert rows.read_text() == "rows" and seen(folder) == "aa" * times
    series.run_series(parameters)
    assert seen(folder) == "aa" * 4


@pytest.mark.integration
def test_a_second_series_on_the_run_is_refused_before_it_touches_anything(notebooks, tmp_path):
    folder = series.run_series({"run": str(tmp_path / "r")})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with locked_elsewhere(folder), pytest.raises(AlpacaError) as refused:
        series.run_series({"run": str(folder), "push_to": "o/b"})
    assert refused.value.code == "run-locked" and str(folder) in str(refused.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.integration
def test_the_notebooks_of_a_series_write_under_its_lock(notebooks, tmp_path):
    code = "from pathlib import Path\nfrom alpaca_helpers.runs import lock_run\nwith lock_run(Path(run)):\n    print(1)"
    write(notebooks[0], FIRST, code)
    series.run_series({"run": str(tmp_path / "r")})


@pytest.mark.integration
def test_a_run_deleted_under_a_notebook_and_a_full_disk_are_sentences(notebooks, tmp_path):
    write(notebooks[0], FIRST, "import shutil; shutil.rmtree(run); open(run + '/x')")
    with pytest.raises(AlpacaError, match="was deleted") as gone:
        series.run_series({"run": str(tmp_path / "r")})
    assert gone.value.code == "run-deleted"
    write(notebooks[0], FIRST, "print(1, file=open('/dev/full', 'w', buffering=1))")
    with pytest.raises(AlpacaError, match="The disk under .* is full") as full:
        series.run_series({"run": str(tmp_path / "s")})
    assert full.value.code == "disk-full"


@pytest.mark.parametrize("content", ["", "{", '{"cells": 3}', '{"cells": [], "metadata": {}, "nbformat": 4}'])
def test_a_broken_notebook_or_one_without_parameters_is_a_sentence(notebooks, content, tmp_path):
    notebooks[0].write_text(content)
    with pytest.raises(AlpacaError, match="01_one.ipynb (cannot be read|has no cell tagged)") as broken:
        series.run_series({"run": str(tmp_path / "r")})
    assert broken.value.code == "notebook-broken" and "\n" not in str(broken.value)


def test_clean_drops_what_belongs_to_one_execution():
    cell = new_code_cell("1", execution_count=7, metadata={"tags": ["x"], "papermill": {"duration": 1}})
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/plain": "0%"}
    cell.outputs = [
        new_output("stream", name="stderr", text="50%"),
        new_output("display_data", data=widget),
        new_output("execute_result", data={"text/plain": "1"}, execution_count=7),
    ]
    injected = new_code_cell("run = '/x'", metadata={"tags": ["injected-parameters"]})
    notebook = new_notebook(cells=[injected, cell], metadata={"widgets": {}, "papermill": {}, "accelerator": "GPU"})
    cleaned = authors.clean(notebook)
    assert [c.source for c in cleaned.cells] == ["1"]
    assert cleaned.cells[0].metadata == {"tags": ["x"]}
    assert [(o.output_type, o.execution_count) for o in cleaned.cells[0].outputs] == [("execute_result", 1)]
    assert cleaned.metadata == {"accelerator": "GPU", "language_info": {"name": "python", "file_extension": ".py"}}


def test_prepared_copies_hold_outputs_and_parameters(notebooks, tmp_path):
    notebook = nbformat.read(notebooks[0], as_version=4)
    notebook.cells[1].outputs = [new_output("stream", text="a\n")]
    nbformat.write(notebook, notebooks[0])
    authors.write_for_nbval(tmp_path / "copies", {"push_to": "b", "run": "r", "profile": "pocket"})
    copy = nbformat.read(tmp_path / "copies" / "01_one.ipynb", as_version=4)
    assert copy.cells[1].metadata.tags == ["injected-parameters"] and 'push_to = "b"' in copy.cells[1].source
    assert copy.cells[2].outputs[0].text == "a\n"


def test_of_another_profile_only_the_independent_cells_are_compared(notebooks, tmp_path):
    notebook = nbformat.read(notebooks[0], as_version=4)
    notebook.cells.append(new_code_cell("2 + 2", metadata={"tags": ["every-profile"]}))
    notebook.cells.append(new_code_cell("3 + 3", metadata={"tags": ["nbval-ignore-output"]}))
    nbformat.write(notebook, notebooks[0])
    authors.write_for_nbval(tmp_path / "copies", {"profile": "gpt2-medium"})
    copy = nbformat.read(tmp_path / "copies" / "01_one.ipynb", as_version=4)
    compared = [cell.source for cell in copy.cells if "nbval-ignore-output" not in cell.metadata.tags]
    assert compared == ["2 + 2"]
    assert copy.cells[-1].metadata.tags == ["nbval-ignore-output"]


@pytest.fixture
def editions(tmp_path, monkeypatch):
    """A notebook of two cells and its French edition, and what reads both from disk."""
    (tmp_path / "fr").mkdir()
    paths = [tmp_path / "01_one.ipynb", tmp_path / "fr" / "01_one.ipynb"]
    for path, prose in zip(paths, ("A word", "Un mot")):
        cells = [new_markdown_cell(prose, id="a"), new_code_cell("1 + 1", id="b", metadata={"tags": []})]
        nbformat.write(new_notebook(cells=cells), path)
    monkeypatch.setattr(authors, "NOTEBOOKS", paths[:1])
    return paths


def without_ids(path):
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        del cell["id"]
    path.write_text(json.dumps(notebook | {"nbformat_minor": 4}))


@pytest.mark.parametrize("which", [0, 1])
def test_cells_saved_without_ids_get_them_back(which, editions):
    without_ids(editions[which])
    authors.clean_all()
    for path, prose in zip(editions, ("A word", "Un mot")):
        cells = nbformat.read(path, as_version=4).cells
        assert [(cell.id, cell.source) for cell in cells] == [("a", prose), ("b", "1 + 1")]


def test_cells_without_ids_that_differ_are_a_sentence_and_nothing_is_rewritten(editions):
    notebook = nbformat.read(editions[0], as_version=4)
    notebook.cells.pop()
    nbformat.write(notebook, editions[0])
    without_ids(editions[0])
    before = [path.read_bytes() for path in editions]
    with pytest.raises(AlpacaError, match="01_one.ipynb was saved without the cells' ids"):
        authors.clean_all()
    assert [path.read_bytes() for path in editions] == before


@pytest.mark.integration
def test_what_an_earlier_notebook_makes_is_made_once_and_only_where_it_is_missing(
    notebooks, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(series, "PRODUCERS", {"seen": "01_one", "later": "03_three"})
    monkeypatch.setattr(series, "MINUTES", {"pocket": {"01_one": 1.6}})
    folder = tmp_path / "r"
    series.run_earlier_notebooks("01_one", "pocket", str(folder))
    assert not (folder / "seen").exists() and capsys.readouterr().out == ""
    for _ in range(2):
        series.run_earlier_notebooks("02_two", "pocket", str(folder))
    assert seen(folder) == "a" and not (folder / "02_two.ipynb").exists()
    told = capsys.readouterr().out
    assert told.startswith(f"The run {folder} has no seen: running 01_one first, about 2 minutes.")
    assert told.count("running") == 1


def test_minutes_are_said_for_each_profile_and_each_notebook_that_others_build_on():
    builders = set(series.PRODUCERS.values()) - {series.NAMES[3]}
    assert {name: set(minutes) for name, minutes in series.MINUTES.items()} == dict.fromkeys(PROFILES, builders)
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    for name, minutes in series.MINUTES["pocket"].items():
        assert re.search(rf"^\| .*notebooks/{name}.*\| {minutes} \|", readme, re.MULTILINE), name
