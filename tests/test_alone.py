"""Each notebook alone in an empty folder, as Colab opens it: python -m pytest tests/test_alone.py

The package comes from a git address by the notebook's own `%pip install`; the other libraries are this environment's.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from conftest import PROJECT

pytestmark = pytest.mark.slow

NOTEBOOKS = {path.stem: path for path in sorted((PROJECT / "notebooks").glob("*.ipynb"))}
EXECUTE = "from nbclient.cli import main; main()"  # `jupyter execute`; the working folder is the notebook's
SETTINGS = {"03_lora_finetuning": {"num_train_epochs": 1}, "04_comparison_and_chat": {"max_heldout_rows": 40}}


def run(command: list, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a command offline, without this process's PYTHONPATH."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ALPACA_LOCKED_RUN")}
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=kept | offline | variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """The address of a git repository with the working tree as its one commit."""
    folder = tmp_path_factory.mktemp("published") / "project"
    unwanted = (".*", "build", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns(*unwanted))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
        done = run([*git, *command], folder)
        assert not done.returncode, done.stderr
    return folder.as_uri()


@pytest.fixture
def python(tmp_path) -> Path:
    """The Python of a fresh virtual environment that sees this one's libraries, but not the package."""
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh"], tmp_path)
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read
    return tmp_path / "fresh" / "bin" / "python"


def alone(name: str, folder: Path, **parameters) -> Path:
    """Return a copy of the notebook, with these parameters typed into its first cell, alone in a new folder."""
    folder.mkdir()
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def printed(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", "")) for output in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_alone_installs_the_package_makes_what_it_needs_and_runs_through(name, address, python, tmp_path):
    notebook = alone(name, tmp_path / "alone", repo_url=address, profile="pocket", **SETTINGS.get(name, {}))
    done = run([python, "-c", EXECUTE, "--inplace", notebook], tmp_path)
    assert not done.returncode, done.stderr[-3000:]
    assert list((tmp_path / "fresh").glob("lib/python*/site-packages/alpaca_helpers/pocket/model"))
    earlier = {"03_lora_finetuning": 1, "04_comparison_and_chat": 2}.get(name, 0)
    run_folder = tmp_path / "alone" / "runs" / "pocket"
    assert [path.stem for path in sorted(run_folder.glob("*.ipynb"))] == list(NOTEBOOKS)[1 : 1 + earlier]
    assert ("first, about" in printed(notebook)) == bool(earlier)


def test_without_an_address_the_first_cell_says_so_in_a_sentence(python, tmp_path):
    notebook = alone("01_base_model", tmp_path / "alone")
    done = run([python, "-c", EXECUTE, notebook], tmp_path)
    assert "alpaca_helpers is not installed: set repo_url to the project's address." in done.stderr


def test_with_run_earlier_off_the_notebook_that_is_missing_is_named(tmp_path):
    notebook = alone("04_comparison_and_chat", tmp_path / "alone", run_earlier=False, profile="pocket")
    done = run([sys.executable, "-c", EXECUTE, notebook], tmp_path, PYTHONPATH=str(PROJECT))
    assert "has no adapter: run notebook 03_lora_finetuning first, with the same `run`" in done.stderr
