"""Colab's first cell: torchao goes, what is missing comes, torch stays; elsewhere nothing happens."""

import json
import os
import subprocess
import sys
import sysconfig
import time
import types
import zipfile
from pathlib import Path

import pytest
from conftest import PROJECT

from alpaca_helpers import AlpacaError, colab

ATTACH = """
from alpaca_helpers import colab
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

def attach():
    tiny = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    return type(get_peft_model(tiny, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))).__name__

try:
    print(attach())
except ImportError as error:
    print(error)
colab.prepare()
print(attach())
"""


@pytest.fixture
def environment(tmp_path) -> Path:
    """The Python of a new environment that sees this one's packages and has torchao 0.10.0, in name, as on Colab."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    write_package(site, "torchao", "0.10.0")
    return tmp_path / "env" / "bin" / "python"


def write_package(site: Path, name: str, version: str) -> None:
    files = {
        f"{name}/__init__.py": "",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}-{version}.dist-info/RECORD"
    files[record] = "".join(f"{file},,\n" for file in [*files, record])
    for file, content in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(content)


def run(python: Path, code: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key != "COLAB_RELEASE_TAG"}
    return subprocess.run(
        [python, "-c", code], env=kept | variables | {"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True
    )


def test_on_colab_an_adapter_attaches_only_after_prepare(environment):
    done = run(environment, ATTACH, COLAB_RELEASE_TAG="1")
    refused, attached = done.stdout.splitlines()
    assert "incompatible version of torchao" in refused and attached == "PeftModel", done.stderr


def test_on_colab_only_what_is_missing_is_installed_and_never_torch(environment, tmp_path):
    write_package(tmp_path / "built", "littlething", "1.5")
    with zipfile.ZipFile(tmp_path / "littlething-1.5-py3-none-any.whl", "w") as wheel:
        for file in (tmp_path / "built").rglob("*"):
            if file.is_file():
                wheel.write(file, file.relative_to(tmp_path / "built"))
    (tmp_path / "requirements.txt").write_text("torch>=999\njupyterlab>=999\npeft>=0.20  # LoRA\nlittlething>=1.2\n")
    code = f"""
import pathlib
from alpaca_helpers import colab
colab.REQUIREMENTS = pathlib.Path({str(tmp_path / "requirements.txt")!r})
colab.prepare()
import littlething
"""
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "COLAB_RELEASE_TAG": "1"}
    done = run(environment, code, **offline)
    assert done.stdout == "Installing littlething>=1.2\n" and not done.returncode, done.stderr
    installed = next((tmp_path / "env").glob("lib/python*/site-packages"))
    assert sorted(path.name for path in installed.glob("*.dist-info")) == ["littlething-1.5.dist-info"]


def test_what_pip_cannot_do_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "requirements.txt").write_text("no-such-thing>=1\n")
    monkeypatch.setattr(colab, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.setattr(colab, "_installed", lambda package: "2.11.0" if package == "torch" else "")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AlpacaError, match="no-such-thing>=1 failed .*No matching distribution"):
        colab.prepare()


def test_elsewhere_nothing_is_run_and_no_time_taken(monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.setattr(colab, "_pip", lambda *arguments: pytest.fail("pip was called"))
    start = time.perf_counter()
    colab.prepare("/content/drive/MyDrive/run")
    assert time.perf_counter() - start < 0.01


def test_a_run_on_drive_mounts_it(monkeypatch, tmp_path):
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=drive))
    monkeypatch.setattr(colab, "_installed", lambda package: "")
    monkeypatch.setattr(colab, "missing_requirements", list)
    monkeypatch.setattr(colab, "DRIVE", tmp_path)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    colab.prepare("first")
    assert not mounted
    colab.prepare(f"{tmp_path}/MyDrive/first")
    assert mounted == [str(tmp_path)]
    drive.mount = None
    with pytest.raises(AlpacaError, match="Drive is not mounted"):
        colab.prepare(f"{tmp_path}/MyDrive/first")


# The cell itself, as it stands in the notebooks


@pytest.mark.parametrize("notebook", sorted((PROJECT / "notebooks").glob("0*.ipynb")), ids=lambda path: path.stem)
def test_the_first_cell_fetches_the_project_when_only_the_notebook_is_there(notebook, tmp_path):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert "parameters" in cells[0]["metadata"]["tags"]
    names, cell = "".join(cells[0]["source"]), "".join(cells[1]["source"])
    there = tmp_path / "origin"  # a repository with the helpers as they are now
    (there / "alpaca_helpers").mkdir(parents=True)
    for name in ("__init__.py", "colab.py"):
        (there / "alpaca_helpers" / name).write_bytes((PROJECT / "alpaca_helpers" / name).read_bytes())
    git = ["git", "-C", there, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    here = tmp_path / "content"
    here.mkdir()
    script = here / "cell.py"

    def run_cell(url: str) -> subprocess.CompletedProcess:
        script.write_text(f"{names}\nrepo_url = {url!r}\n{cell}\nprint(sys.modules['alpaca_helpers.colab'].__file__)")
        # -S: without the packages installed here, of which the project itself may be one
        return subprocess.run([sys.executable, "-S", script], cwd=here, capture_output=True, text=True)

    assert "set repo_url" in run_cell("").stderr
    assert "could not be fetched from" in run_cell(str(tmp_path / "nowhere")).stderr
    first = run_cell(there.as_uri())
    assert first.stdout.startswith(str(here)), first.stderr
    assert run_cell("").stdout == first.stdout  # the second notebook finds what the first one fetched
