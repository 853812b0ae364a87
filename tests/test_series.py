"""The batch driver, on two small notebooks made here."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from alpaca_helpers import AlpacaError, series
from alpaca_helpers.runs import read_manifest
from tools import notebooks as authors

FIRST = 'word: str = "a"  # a word\nrun: str = ""  # the run\nfail: bool = False  # whether to fail'
SECOND = "open(run + '/seen', 'a').write(word)\nif fail:\n    raise ValueError('the bread is burnt')\nprint(word)"


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


@pytest.mark.slow
def test_only_what_changed_is_executed_again(notebooks, tmp_path):
    parameters = {"run": str(tmp_path / "r"), "word": "a"}
    folder = series.run_series(parameters)
    assert seen(folder) == "aa"
    series.run_series(parameters)
    assert seen(folder) == "aa"
    write(notebooks[1], FIRST, SECOND + "  # changed")
    series.run_series(parameters)
    assert seen(folder) == "aaa"
    series.run_series({**parameters, "word": "b"})
    assert seen(folder) == "aaabb"
    series.run_series(parameters)  # the run was remade since
    assert seen(folder) == "aaabbaa"


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_failed_cell_is_its_sentence_and_its_notebook_is_not_done(notebooks, tmp_path):
    parameters = {"run": str(tmp_path / "r"), "fail": True}
    with pytest.raises(AlpacaError, match="ValueError: the bread is burnt .*01_one.ipynb"):
        series.run_series(parameters)
    assert read_manifest(tmp_path / "r")["notebooks"] == {}
    series.run_series({**parameters, "fail": False})
    assert seen(tmp_path / "r") == "aaa"


def test_an_unknown_parameter_is_an_error_that_lists_the_names(notebooks):
    series.check_parameters({"word": "x"})
    with pytest.raises(AlpacaError, match="has a parameter 'wrod': choose among fail, run, word"):
        series.check_parameters({"wrod": "x"})


@pytest.mark.parametrize(
    "text, value", [("3", 3), ("3e-4", 3e-4), ("true", True), ("False", False), ("None", None), ("a b", "a b")]
)
def test_values_of_the_command_line(text, value):
    assert series._literal(text) == value


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
    assert cleaned.metadata == {"accelerator": "GPU", "language_info": {"name": "python"}}


def test_prepared_copies_hold_outputs_and_parameters(notebooks, tmp_path):
    notebook = nbformat.read(notebooks[0], as_version=4)
    notebook.cells[1].outputs = [new_output("stream", text="a\n")]
    nbformat.write(notebook, notebooks[0])
    authors.write_for_nbval(tmp_path / "copies", {"word": "b", "run": "r", "profile": "pocket"})
    copy = nbformat.read(tmp_path / "copies" / "01_one.ipynb", as_version=4)
    assert copy.cells[1].metadata.tags == ["injected-parameters"] and 'word = "b"' in copy.cells[1].source
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
