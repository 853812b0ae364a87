"""Code from elsewhere, secrets, undeclared imports, dead links and commands, names that a shell would read."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from support import PROJECT

from alpaca_helpers.config import PROFILES

README = PROJECT / "README.md"
DOCS = sorted((PROJECT / "docs").glob("*.md"))
TABLE = PROJECT / "tests" / "README.md"
PAGES = [
    README,
    *DOCS,
    TABLE,
    *(PROJECT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "dev/pocket/README.md")),
]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
TESTS = {path.stem: path.read_text(encoding="utf-8") for path in PROJECT.glob("tests/test_*.py")}
NOTEBOOKS = sorted(PROJECT.glob("notebooks/**/*.ipynb"))
CELLS = {path: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in NOTEBOOKS}
FOLDERS = ("alpaca_helpers", "alpaca_lessons", "alpaca_export", "benchmarks", "dev", "tools")
SOURCES = {path: path.read_text(encoding="utf-8") for folder in FOLDERS for path in PROJECT.glob(f"{folder}/**/*.py")}
for notebook, cells in CELLS.items():
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    SOURCES[notebook] = "\n".join(map(TransformerManager().transform_cell, code))


def faults(tree: ast.AST) -> list[str]:
    """What a piece of code does that it may not."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, named = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        if named.get("trust_remote_code", "False") != "False":
            found.append("trust_remote_code")
        if name == "torch.load" and named.get("weights_only") != "True":
            found.append("torch.load without weights_only")
        if name in ("eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "joblib.load"):
            found.append(name)
        if named.get("shell", "False") != "False":
            found.append("shell")
    return found


def test_no_code_from_elsewhere_is_run():
    for code in (
        "load(x, trust_remote_code=True)",
        "load(x, trust_remote_code=flag)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "eval(x)",
        "os.system(x)",
        "pickle.load(x)",
        "subprocess.run(x, shell=True)",
    ):
        assert faults(ast.parse(code)), f"the search does not find {code}"
    runs_the_notebooks = {PROJECT / "alpaca_helpers" / "cells.py": ["exec", "compile"]}  # the project's own
    for path, source in SOURCES.items():
        assert faults(ast.parse(source)) == runs_the_notebooks.get(path, []), path


def test_what_comes_from_the_hub_is_pinned_to_a_commit():
    for profile in PROFILES.values():
        for name, revision in ((profile.model, profile.model_revision), (profile.dataset, profile.dataset_revision)):
            if not (PROJECT / name).exists() and name.count("/") == 1:
                assert re.fullmatch("[0-9a-f]{40}", revision or ""), name


def test_workflows_use_githubs_own_actions_by_major_version():
    for workflow in PROJECT.glob(".github/**/*.yml"):
        used = re.findall(r"uses: *(.+)", workflow.read_text(encoding="utf-8"))
        assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+|\./\.github/setup", action) for action in used), workflow


SECRET = rb"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY"
MACHINE = r"(?<![\w.~/])/(?:home|Users|root|work|tmp|mnt|content/drive)/\w+"


@pytest.mark.integration
def test_no_file_holds_a_secret_or_is_over_five_megabytes():
    listed = subprocess.run(["git", "-C", str(PROJECT), "ls-files", "-z"], capture_output=True)
    if listed.returncode:
        pytest.skip("this copy of the project is not a git repository")
    assert re.search(SECRET, b"hf_" + b"a" * 34)
    for path in (PROJECT / name for name in listed.stdout.decode().split("\0") if name):
        if path.is_file():
            content = path.read_bytes()
            assert len(content) < 5_000_000 and not re.search(SECRET, content), path


def test_no_path_of_a_machine_is_in_a_stored_output():
    assert re.search(MACHINE, "saved in /home/me/run")
    for path, cells in CELLS.items():
        outputs = json.dumps([cell["outputs"] for cell in cells if cell["cell_type"] == "code"])
        assert not re.search(MACHINE, outputs), path


def requirements(file: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (PROJECT / file).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED, FOR_NOTEBOOKS = ([str(line) for line in requirements(f"requirements{name}.txt")] for name in ("", "/notebooks"))
KNOWN = packages_distributions()
PACKAGES = ("alpaca_helpers", "alpaca_lessons", "alpaca_export")
MODULES = [path for path in SOURCES if path.relative_to(PROJECT).parts[0] in PACKAGES and path.suffix == ".py"]


def names(lines: list[str]) -> set[str]:
    """Return the distributions that requirements name, as an index spells them."""
    return {re.sub(r"[-_.]+", "-", Requirement(line).name).lower() for line in lines}


def imported(source: str, within_functions: bool = True) -> set[str]:
    """Return the distributions of the packages that a module imports, the standard library's apart."""
    tree, found = ast.parse(source), set()
    for node in ast.walk(tree) if within_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return names([KNOWN.get(name, [name])[0] for name in found - set(sys.stdlib_module_names)])


def test_each_import_is_declared_and_each_dependency_imported():
    """What only runs notebooks is imported within the functions that do; the helpers import none of ours."""
    used = {"accelerate", "jinja2"}  # Trainer and model cards import them
    for path in [path for path in MODULES if path.name != "gguf.py"]:  # imported by who asks for it alone
        allowed = NEEDED + [PYPROJECT["name"]] * (not path.is_relative_to(PROJECT / "alpaca_helpers"))
        assert imported(SOURCES[path], within_functions=False) - names(allowed) == set(), path
        assert imported(SOURCES[path]) - names(allowed + FOR_NOTEBOOKS * (path.name == "series.py")) == set(), path
        used |= imported(SOURCES[path])
    assert names(NEEDED) - used == set()


def test_an_error_is_one_sentence():
    for path, source in SOURCES.items():
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "AlpacaError":
                assert len(call.args) == 1, f"{path}, line {call.lineno}"


def test_the_pinned_versions_are_within_the_required_ones():
    for file in ("constraints.txt", "constraints-colab.txt"):
        pinned = {requirement.name: str(requirement.specifier)[2:] for requirement in requirements(file)}
        for requirement in map(Requirement, NEEDED + FOR_NOTEBOOKS):
            assert requirement.specifier.contains(pinned.get(requirement.name, "999")), (file, requirement)


NOT_IN_CI = {  # how a command begins, and part of the name of the test that runs it
    "make run PROFILE=gpt2-medium": "the_whole_series_from_the_stand_in",
    "make run RUN=large PROFILE=gpt2-medium PARAMS=": "the_whole_series_from_the_stand_in",
    'make run RUN=document PARAMS="-p recipe document"': "every_recipe",
    "git clone": "by hand",
    "cd REPOSITORY": "by hand",
    "make further": "prints_a_warning",
    "python3 -m venv .venv": "by hand",  # what `make setup` does
    "mkdir -p runs/pocket": "by hand",
    ".venv/bin/papermill notebooks/$n.ipynb": "papermill_alone",
    ".venv/bin/pytest --nbval notebooks": "papermill_alone",
    "make table RUNS=": "table",
    ".venv/bin/python -m alpaca_helpers.chat --run pocket": "streams_stops_at_ctrl_c",
    ".venv/bin/python -m alpaca_helpers.series --profile gpt2-medium": "the_whole_series_from_the_stand_in",
    ".venv/bin/torchrun --nproc-per-node 4 -m alpaca_helpers.training": "two_processes",
    ".venv/bin/lm_eval": "by hand",  # a large package of its own
    'pip install "transformers[serving]"': "server_of_transformers",
    "transformers serve runs/pocket/merged": "server_of_transformers",
    "curl localhost:8000/v1/chat/completions": "server_of_transformers",
    "cd runs/pocket": "by hand",
    "ollama": "not tried",
    '.venv/bin/pip install -e ".[tensorboard]"': "by hand",
    'make run RUN=mine PARAMS="-p report_to tensorboard"': "report_to",
    ".venv/bin/tensorboard --logdir runs": "by hand",
}


def joined(text: str) -> str:
    """Return a shell's text with the lines joined that a backslash goes on in."""
    return re.sub(r"\s*\\\n\s*", " ", text)


def test_each_command_of_the_pages_is_run_somewhere():
    """The lines of the pages' blocks of shell, whole, without comments and loops."""
    ci, places = joined((PROJECT / ".ci" / "run").read_text(encoding="utf-8")), set()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", "\n".join(TEXTS[page] for page in [README, *DOCS]), re.DOTALL))
    for command in (re.sub(r"\s+#.*", "", line).strip() for line in joined(blocks).splitlines()):
        if not command or command.startswith("for ") or command == "done":
            continue
        if not re.search(rf"^ *{re.escape(command)}( \||$)", ci, re.MULTILINE):
            place = max((start for start in NOT_IN_CI if command.startswith(start)), key=len, default="")
            assert place, f"{command} is neither in .ci/run nor among NOT_IN_CI"
            places.add(place)
    assert places == set(NOT_IN_CI)
    for test in set(NOT_IN_CI.values()) - {"by hand", "not tried"}:
        assert any(re.search(rf"def test_\w*{test}", text) for text in TESTS.values()), test


def test_each_target_that_the_pages_name_is_there():
    targets = re.findall(r"^([a-z-]+):.*## ", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for page, text in TEXTS.items():
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets), page


def anchors(text: str) -> set[str]:
    """Return the names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_each_link_and_picture_of_the_pages_is_there():
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), (page, link)
            assert not anchor or anchor in anchors(TEXTS[target]), (page, link)
        for published in re.findall(r"OWNER/REPOSITORY/(?:blob/main|actions)/([\w./]+?)(?:/badge\.svg)?\)", text):
            assert any((PROJECT / start / published).exists() for start in ("", ".github")), (page, published)


def test_the_glossary_has_the_same_entries_in_both_languages():
    english, french = (TEXTS[PROJECT / "docs" / name] for name in ("glossary.md", "glossaire.md"))
    for pattern in (r"^## Notebook \d\d|^- (?:\*\*)?", r"https?:[^)]+|\w+\.ipynb", r"`[^`]+`", r"\b(?:19|20)\d\d\b"):
        assert re.findall(pattern, french, re.MULTILINE) == re.findall(pattern, english, re.MULTILINE)


def test_each_fault_of_the_table_has_its_tests():
    rows = re.findall(r"^\|.*\| (test_.*) \|$", re.sub(r" \([^)]*\)", "", TEXTS[TABLE]), re.MULTILINE)
    assert len(rows) > 40
    for file, parts in (named.partition(":")[::2] for row in rows for named in row.split("; ")):
        assert file in TESTS, file
        for part in re.findall(r"\w+", parts):
            found = [name for name, text in TESTS.items() if re.search(rf"def test_\w*{part}", text)]
            assert file in found, f"{part} is not in {file}, but in {found}"


RECORD = """#!/bin/sh
{ printf '%s\\0' "$@"; printf '\\n'; } >> "${0%/*}/calls"
"""


@pytest.fixture
def make(tmp_path):
    """Runs make with programs that only note their arguments; returns its status, what was printed, and the calls."""
    (tmp_path / "bin").mkdir()
    for name in ("bin/python", "bin/ruff", "bin/mypy", ".ready", ".testable"):
        (tmp_path / name).write_text(RECORD)
        (tmp_path / name).chmod(0o755)
    variables = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}  # not what make was called with

    def call(*arguments: str, **more: str) -> tuple[int, str, list[list[str]]]:
        (tmp_path / "bin" / "calls").write_text("")
        command = ["make", f"VENV={tmp_path}", f"PYTHON={tmp_path}/bin/python", *arguments]
        done = subprocess.run(command, cwd=PROJECT, env=variables | more, capture_output=True, text=True)
        calls = (tmp_path / "bin" / "calls").read_text().splitlines()
        return done.returncode, done.stdout + done.stderr, [line.split("\0")[:-1] for line in calls]

    return call


@pytest.mark.integration
@pytest.mark.parametrize("name", ['it\'s a "b"; echo X', "$HOME $(touch made) `touch made`", "-x"])
def test_a_name_reaches_the_program_as_it_is(make, name):
    for target, variable, argument in (
        ("run", "RUN", f"--run={name}"),
        ("run", "PROFILE", f"--profile={name}"),
        ("test", "PROFILE", f"--profile={name}"),
        ("real", "DATASET", f"--dataset={name}"),
    ):
        for status, said, calls in (make(target, f"{variable}={name}"), make(target, **{variable: name})):
            assert status == 0 and argument in [word for call in calls for word in call], said
            assert "X" not in said.splitlines() and not (PROJECT / "made").exists()


@pytest.mark.integration
def test_without_a_name_the_program_chooses_and_parameters_are_words_as_a_shell_reads_them(make):
    for arguments in ([], ["PROFILE=", "RUN="]):
        assert make("run", *arguments)[2] == [["-m", "alpaca_helpers.series", "--profile=auto"]]
    for arguments in ([], ["PROFILE="], ["PROFILE=auto"]):  # the stored outputs are the pocket's
        assert "--profile=pocket" in [word for call in make("test", *arguments)[2] for word in call]
    (call,) = make("run", "PROFILE=pocket", "PARAMS=-p dataset_name 'my rows.json' -p seed 1")[2]
    assert call[2:] == ["--profile=pocket", "-p", "dataset_name", "my rows.json", "-p", "seed", "1"]
    assert make("table", "RUNS=a 'b c'")[2] == [["-m", "benchmarks.recipes", "a", "b c"]]
    status, said, calls = make("table")
    assert status and not calls and "RUNS=" in said


def test_clean_keeps_an_environment_that_make_has_not_made(tmp_path):
    shutil.copy(PROJECT / "Makefile", tmp_path)
    for place in (".venv/bin", ".venv-colab/bin", "build/nbval", "runs/pocket"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / ".venv-colab" / ".ready").touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {"Makefile", ".venv", "runs"}


@pytest.mark.integration
def test_links_badges_and_notebooks_get_the_address(tmp_path):
    """What is no address of a repository is refused, and nothing is written."""
    for name in ("Makefile", "README.md", "pyproject.toml", "docs", "notebooks"):
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, tmp_path / name)

    def contents() -> dict[Path, str]:
        pages = [*tmp_path.rglob("*.md"), *tmp_path.rglob("*.ipynb")]
        return {path: path.read_text(encoding="utf-8") for path in pages}

    def make_address(given: str) -> subprocess.CompletedProcess:
        return subprocess.run(["make", "address", f"REPO_URL={given}"], cwd=tmp_path, capture_output=True, text=True)

    before = contents()
    for given in ("", "https://example.org/a/b", "https://github.com/a/b'; touch made; '", "https://github.com/a/b\nc"):
        refused = make_address(given)
        assert refused.returncode and "REPO_URL=" in refused.stdout and contents() == before
    assert make_address("https://github.com/ada/another.one").returncode == 0
    after = contents()
    readme, notebooks = after[tmp_path / "README.md"], [text for path, text in after.items() if path.suffix == ".ipynb"]
    assert readme.count("research.google.com/github/ada/another.one/blob/main/notebooks") == 4
    assert before.keys() == after.keys() and not any("OWNER/REPOSITORY" in text for text in after.values())
    for text in notebooks:
        parameters = "".join(json.loads(text)["cells"][1]["source"])
        assert 'repo_url: str = "https://github.com/ada/another.one"  #' in parameters
