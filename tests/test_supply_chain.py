"""What the project's own files may not do or hold: `python -m pytest tests/test_supply_chain.py`."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
from support import PROJECT

from alpaca_helpers.profiles import PROFILES

FOLDERS = ("alpaca_helpers", "benchmarks", "pocket", "tools")
SOURCES = sorted(path for folder in FOLDERS for path in PROJECT.glob(f"{folder}/**/*.py"))
NOTEBOOKS = sorted(PROJECT.glob("notebooks/*.ipynb"))
TREES = {str(path.relative_to(PROJECT)): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
for notebook in NOTEBOOKS:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = re.sub(r"^( *)%.*$", r"\1pass", code, flags=re.MULTILINE)  # IPython's own commands
    TREES[str(notebook.relative_to(PROJECT))] = ast.parse(code)


def faults(tree) -> list[str]:
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


@pytest.mark.parametrize("name", TREES)
def test_no_code_from_elsewhere_is_run(name):
    assert faults(TREES[name]) == []


@pytest.mark.parametrize(
    "code",
    [
        "load(x, trust_remote_code=True)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "eval(x)",
        "os.system(x)",
        "pickle.load(x)",
        "subprocess.run(x, shell=True)",
        "load(x, trust_remote_code=flag)",
    ],
)
def test_the_search_finds_what_it_looks_for(code):
    assert faults(ast.parse(code))


def test_what_comes_from_the_hub_is_pinned_to_a_commit():
    for profile in PROFILES.values():
        for name, revision in ((profile.model, profile.model_revision), (profile.dataset, profile.dataset_revision)):
            if not (PROJECT / name).exists() and name.count("/") == 1:
                assert re.fullmatch("[0-9a-f]{40}", revision or ""), name


def test_workflows_use_githubs_own_actions_by_major_version():
    for workflow in PROJECT.glob(".github/workflows/*.yml"):
        used = re.findall(r"uses: *(.+)", workflow.read_text(encoding="utf-8"))
        assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used), workflow


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listed = subprocess.run(["git", "-C", str(PROJECT), "ls-files", "-z"], capture_output=True)
    if listed.returncode:
        pytest.skip("this copy of the project is not a git repository")
    return [PROJECT / name for name in listed.stdout.decode().split("\0") if name]


def test_no_file_is_over_five_megabytes(tracked):
    assert [path for path in tracked if path.is_file() and path.stat().st_size > 5_000_000] == []


SECRET = r"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY"
MACHINE = r"(?<![\w.~/])/(?:home|Users|root|work|tmp|mnt|content/drive)/\w+"


def test_no_secret_is_in_any_file(tracked):
    for path in tracked:
        if path.is_file():
            assert not re.search(SECRET.encode(), path.read_bytes()), path


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_path_of_a_machine_is_in_a_stored_output(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = json.dumps([cell["outputs"] for cell in cells if cell["cell_type"] == "code"])
    assert not re.search(MACHINE, outputs)


def test_the_search_finds_secrets_and_paths():
    assert re.search(SECRET, "hf_" + "a" * 34) and re.search(MACHINE, "saved in /home/me/run")
