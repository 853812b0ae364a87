"""Each notebook alone in an empty folder, as Colab opens it: python -m pytest tests/test_alone.py

The package comes from a git address by the notebook's own `%pip install`; the other libraries are this environment's.
"""

import sys
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from support import PROJECT
from support.fresh import copy_project, fresh_python, run

from alpaca_helpers.cells import NAMES, NOTEBOOKS

pytestmark = pytest.mark.nightly

EXECUTE = "from nbclient.cli import main; main()"  # `jupyter execute`; the working folder is the notebook's
SETTINGS = {"03_lora_finetuning": {"num_train_epochs": 1}, "04_comparison_and_chat": {"max_heldout_rows": 40}}


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """The address of a git repository with the working tree as its one commit."""
    folder = copy_project(tmp_path_factory.mktemp("published") / "project")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
        done = run([*git, *command], folder)
        assert not done.returncode, done.stderr
    return folder.as_uri()


def alone(name: str, folder: Path, **parameters) -> Path:
    """Return a copy of the notebook with these parameters, alone in a new folder."""
    folder.mkdir()
    notebook = parameterize_notebook(load_notebook_node(str(PROJECT / "notebooks" / f"{name}.ipynb")), parameters)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_alone_installs_the_package_makes_what_it_needs_and_runs_through(name, address, tmp_path):
    notebook = alone(name, tmp_path / "alone", repo_url=address, profile="pocket", **SETTINGS.get(name, {}))
    python, site = fresh_python(tmp_path)
    done = run([python, "-c", EXECUTE, "--inplace", notebook], tmp_path, PIP_NO_BUILD_ISOLATION="0")
    assert not done.returncode, done.stderr[-3000:]
    assert (site / "alpaca_helpers" / "pocket" / "model").is_dir()
    earlier = {"03_lora_finetuning": 1, "04_comparison_and_chat": 2}.get(name, 0)
    run_folder = tmp_path / "alone" / "runs" / "pocket"
    assert [path.stem for path in sorted(run_folder.glob("*.ipynb"))] == [*NAMES[1 : 1 + earlier]]
    assert (" first. (If you have such a run elsewhere" in notebook.read_text(encoding="utf-8")) == bool(earlier)


def test_without_an_address_the_first_cell_says_so_in_a_sentence(tmp_path):
    notebook = alone("01_base_model", tmp_path / "alone")
    done = run([fresh_python(tmp_path)[0], "-c", EXECUTE, notebook], tmp_path)
    assert "alpaca_helpers is not installed: set repo_url to the project's address." in done.stderr


def test_with_run_earlier_off_the_notebook_that_is_missing_is_named(tmp_path):
    notebook = alone("04_comparison_and_chat", tmp_path / "alone", run_earlier=False, profile="pocket")
    done = run([sys.executable, "-c", EXECUTE, notebook], tmp_path, PYTHONPATH=str(PROJECT))
    assert "has no data: run notebook 02_dataset_and_tokenizer first, with the same `run`" in done.stderr


def test_papermill_alone_runs_a_notebook_and_nbval_checks_it(tmp_path):
    notebook, executed = NOTEBOOKS[1], tmp_path / "02.ipynb"
    command = [sys.executable, "-m", "papermill", notebook, executed, "-p", "profile", "pocket"]
    done = run([*command, "-p", "run", tmp_path / "r"], PROJECT, PYTHONPATH=str(PROJECT))
    assert not done.returncode and (tmp_path / "r" / "data").is_dir(), done.stderr
    done = run([sys.executable, "-m", "pytest", "--nbval", executed], PROJECT, PYTHONPATH=str(PROJECT))
    assert not done.returncode, done.stdout
