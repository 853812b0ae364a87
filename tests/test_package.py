"""The package as others install it: what it declares, what is in its wheel: python -m pytest tests/test_package.py"""

import ast
import re
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support import PROJECT
from support.fresh import copy_project, fresh_python, run

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = PYPROJECT["project"]["dependencies"]
NOTEBOOKS = PYPROJECT["project"]["optional-dependencies"]["notebooks"]
MODULES = sorted((PROJECT / "alpaca_helpers").rglob("*.py"))
BATCH = "series.py"  # runs notebooks, so it alone may import what only runs notebooks
KNOWN = packages_distributions()

# Nothing that only runs notebooks can be imported; ipykernel can, since ipywidgets 7 imports it.
WITHOUT_NOTEBOOKS = """
import importlib, sys
names = sys.argv[1:]
for blocked in ("jupyterlab", "papermill", "nbformat", "nbval", "nbclient"):
    sys.modules[blocked] = None
for name in names:
    importlib.import_module(name)
"""

# A stranger's first lines, in an empty folder
ANSWER = """
import alpaca_helpers
from alpaca_helpers import pocket
from alpaca_helpers.generation import generate
from alpaca_helpers.models import load_base, load_tokenizer
from alpaca_helpers.prompts import format_prompt
from alpaca_helpers.runs import run_folder

tokenizer = load_tokenizer(str(pocket.MODEL))
model = load_base(str(pocket.MODEL))
answer, = generate(model, tokenizer, [format_prompt("What is the capital of France?")], max_new_tokens=8)
print(alpaca_helpers.__file__, run_folder("x"), len(answer.text), sep="\\n")
"""


def names(lines: list[str]) -> set[str]:
    """Return the distributions that requirements name, as an index spells them."""
    return {re.sub(r"[-_.]+", "-", Requirement(line).name).lower() for line in lines}


def imported(path: Path) -> set[str]:
    """Return the distributions of the packages that a module imports anywhere, the standard library's apart."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    found -= set(sys.stdlib_module_names)
    return names([KNOWN.get(name, [name])[0] for name in found])


def lines_of(name: str) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (PROJECT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


# What is declared


def test_requirements_txt_says_what_pyproject_says():
    listed = {str(Requirement(line)) for line in lines_of("requirements.txt")}
    assert listed == {str(Requirement(line)) for line in DEPENDENCIES + NOTEBOOKS}


def test_each_requirement_has_its_reason():
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#") and not re.search(r" # \w", line)] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_each_import_is_declared(path):
    declared = names(DEPENDENCIES + NOTEBOOKS * (path.name == BATCH))
    assert imported(path) - declared == set()


def test_each_dependency_is_imported():
    used = {"accelerate"}.union(*map(imported, MODULES))  # Trainer imports accelerate
    assert names(DEPENDENCIES) - used == set()


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-colab.txt"])
def test_what_is_declared_admits_the_pinned_versions(file):
    pinned = {Requirement(line).name: str(Requirement(line).specifier)[2:] for line in lines_of(file)}
    for requirement in map(Requirement, DEPENDENCIES + NOTEBOOKS):
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


@pytest.mark.integration
def test_every_module_imports_without_what_runs_notebooks():
    inside = [path.relative_to(PROJECT).with_suffix("") for path in MODULES if path.name != "__main__.py"]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in inside]
    done = run([sys.executable, "-c", WITHOUT_NOTEBOOKS, *modules], PROJECT, PYTHONPATH=str(PROJECT))
    assert not done.returncode, done.stderr


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("build")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy_project(folder / "project")]
    done = run([sys.executable, "-m", "pip", *build], folder)
    assert not done.returncode, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.integration
def test_the_wheel_holds_the_package_the_pocket_and_the_notebooks_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    folders = (PROJECT / "alpaca_helpers" / "pocket" / name for name in ("model", "instructions", "document"))
    pocket = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    notebooks = {f"alpaca_helpers/notebooks/{path.name}" for path in (PROJECT / "notebooks").glob("*.ipynb")}
    assert files == {path.relative_to(PROJECT).as_posix() for path in [*MODULES, *pocket]} | notebooks
    assert len(notebooks) == 4
    assert {"License-Expression: MIT", "Description-Content-Type: text/markdown"} <= set(metadata.splitlines())


@pytest.mark.integration
def test_installed_elsewhere_the_pocket_answers_and_nothing_is_left_in_site_packages(wheel, tmp_path):
    python, site = fresh_python(tmp_path)
    done = run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel], tmp_path)
    assert not done.returncode, done.stderr
    installed = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    (tmp_path / "empty").mkdir()
    done = run([python, "-c", ANSWER], tmp_path / "empty")
    assert not done.returncode, done.stderr
    package, folder, length = done.stdout.splitlines()
    assert Path(package).is_relative_to(site) and Path(folder).is_relative_to(tmp_path / "empty")
    assert int(length) > 0
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == installed
