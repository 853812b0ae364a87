"""The wheel as a stranger installs it: what is in it, that it answers, that nothing is written beside it."""

import sys
import zipfile
from pathlib import Path

import pytest
from support import PROJECT
from support.fresh import copy_project, fresh_python, run

pytestmark = pytest.mark.nightly

NOTEBOOKS = PROJECT / "notebooks"
MODULES = sorted(PROJECT.glob("alpaca_*/**/*.py"))

# Nothing that only runs notebooks can be imported; ipykernel can, since ipywidgets 7 imports it.
WITHOUT_NOTEBOOKS = """
import importlib, sys
sys.modules |= dict.fromkeys(("jupyterlab", "papermill", "nbformat", "nbval", "nbclient"))
for name in sys.argv[1:]:
    importlib.import_module(name)
"""

# A stranger's first lines, in an empty folder
ANSWER = """
import alpaca_helpers
from alpaca_helpers import pocket
from alpaca_helpers.generation import generate
from alpaca_helpers.models import load_base, load_tokenizer
from alpaca_helpers.prompts import format_prompt
from alpaca_helpers.run import Run

tokenizer = load_tokenizer(str(pocket.MODEL))
model = load_base(str(pocket.MODEL))
answer, = generate(model, tokenizer, [format_prompt("What is the capital of France?")], max_new_tokens=8)
print(alpaca_helpers.__file__, Run.named("x").folder, len(answer.text), sep="\\n")
"""


def succeed(command: list, folder: Path, **variables: str) -> str:
    done = run(command, folder, **variables)
    assert not done.returncode, done.stderr
    return done.stdout


def test_every_module_imports_without_what_runs_notebooks():
    inside = [path.relative_to(PROJECT).with_suffix("") for path in MODULES if path.name != "__main__.py"]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in inside]
    succeed([sys.executable, "-c", WITHOUT_NOTEBOOKS, *modules], PROJECT, PYTHONPATH=str(PROJECT))


def test_the_wheel_holds_the_package_the_pocket_and_the_notebooks_and_answers_where_it_is_installed(tmp_path):
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, copy_project(tmp_path / "project")]
    succeed([sys.executable, "-m", "pip", *build], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    folders = (PROJECT / "alpaca_helpers" / "pocket" / name for name in ("model", "instructions", "document"))
    pocket = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    paths = [
        path.relative_to(PROJECT) for pattern in ("*.ipynb", "further/*.ipynb") for path in NOTEBOOKS.glob(pattern)
    ]
    notebooks = {f"alpaca_helpers/{path.as_posix()}" for path in paths}
    others = {"alpaca_helpers/card.md", "alpaca_helpers/py.typed"}
    assert files == {path.relative_to(PROJECT).as_posix() for path in [*MODULES, *pocket]} | notebooks | others
    assert len(notebooks) == 7 and "License-Expression: MIT" in metadata.splitlines()

    python, site = fresh_python(tmp_path)
    succeed([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel], tmp_path)
    installed = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    (tmp_path / "empty").mkdir()
    package, folder, length = succeed([python, "-c", ANSWER], tmp_path / "empty").splitlines()
    assert Path(package).is_relative_to(site) and Path(folder).is_relative_to(tmp_path / "empty") and int(length) > 0
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == installed
