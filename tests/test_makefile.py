"""What the Makefile hands to the programs, and `make address`: python -m pytest tests/test_makefile.py"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import PROJECT

from tools.address import repository, rewrite

pytestmark = pytest.mark.integration

RECORD = """#!/usr/bin/env python3
import json, pathlib, sys
with open(pathlib.Path(__file__).parent / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
"""
TWO = ["-n", "2", "--dist", "loadscope"]  # the notebooks need one another, so nbval goes through them in order
ADA = "https://github.com/ada/assistant"


@pytest.fixture
def make(tmp_path):
    """Runs make in a copy of the project's front, with an environment whose programs only note their arguments.

    Returns the finished process and the arguments of each call of `python` and `pytest`.
    """
    for name in ("Makefile", "README.md", "requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(PROJECT / name, tmp_path)
    for name in ("notebooks", "tools"):
        shutil.copytree(PROJECT / name, tmp_path / name)
    environment = tmp_path / ".venv" / "bin"
    environment.mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        (environment / name).write_text(RECORD)
        (environment / name).chmod(0o755)
    for name in (".ready", ".testable"):
        (environment.parent / name).touch()
    variables = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}  # not what make was called with

    def call(*arguments: str, **more: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        (environment / "calls").write_text("")
        done = subprocess.run(["make", *arguments], cwd=tmp_path, env=variables | more, capture_output=True, text=True)
        return done, [json.loads(line) for line in (environment / "calls").read_text().splitlines()]

    return call


@pytest.mark.parametrize("run", ["mine", "a b", "it's", "zz;echo X", 'say "x"', "$HOME", "$(touch made)", "`ls`", "-x"])
def test_a_runs_name_reaches_the_program_as_it_is(make, run, tmp_path):
    done, calls = make("run", f"RUN={run}")
    assert calls == [["-m", "alpaca_helpers.series", "--profile=auto", f"--run={run}"]], done.stderr
    assert "X" not in done.stdout.splitlines() and not (tmp_path / "made").exists()


def test_without_a_name_or_a_profile_the_program_chooses(make):
    assert make("run")[1] == make("run", "PROFILE=", "RUN=")[1] == [["-m", "alpaca_helpers.series", "--profile=auto"]]


def test_names_may_come_from_the_environment(make):
    expected = ["-m", "alpaca_helpers.series", "--profile=pocket", "--run=a b"]
    assert make("run", PROFILE="pocket", RUN="a b")[1] == [expected]


def test_parameters_are_words_as_a_shell_reads_them(make):
    calls = make("run", "PROFILE=pocket", "PARAMS=-p dataset 'my rows.json' -p seed 1")[1]
    assert calls[0][2:] == ["--profile=pocket", "-p", "dataset", "my rows.json", "-p", "seed", "1"]


@pytest.mark.parametrize("given, taken", [(None, "pocket"), ("", "pocket"), ("auto", "pocket"), ("a b;c", "a b;c")])
def test_make_test_is_whole_and_its_notebooks_run_on_the_pocket(make, given, taken):
    done, calls = make("test", *([] if given is None else [f"PROFILE={given}"]))
    assert calls == [
        ["check", "."],
        ["format", "--check", "."],
        [],
        ["-m", "pytest", *TWO],
        ["-m", "tools.notebooks", "--for-nbval", "build/nbval", f"--profile={taken}"],
        ["-m", "pytest", "--nbval", "build/nbval"],
    ], done.stderr


def test_make_quick_leaves_out_the_slow(make):
    assert make("quick")[1] == [["-m", "pytest", *TWO, "-m", "not slow"]]


def test_make_table_asks_which_runs(make):
    done, calls = make("table")
    assert done.returncode and calls == [] and 'make table RUNS="a b c"' in done.stdout
    assert make("table", "RUNS=a 'b c'")[1] == [["-m", "benchmarks.recipes", "a", "b c"]]


def test_make_real_takes_rows_and_options(make):
    calls = [call for call in make("real", "DATASET=my rows.json", "PARAMS=--small")[1] if "pip" not in call]
    assert calls == [["-m", "benchmarks.real", "--dataset=my rows.json", "--small"]]
    assert make("real")[1][-1] == ["-m", "benchmarks.real"]


# make address


@pytest.mark.parametrize(
    "address",
    [
        ADA,
        f"{ADA}/",
        f"{ADA}.git",
        f"{ADA}/tree/main",
        "https://token@github.com/ada/assistant.git",
        "git@github.com:ada/assistant.git",
        "ssh://git@github.com/ada/assistant",
    ],
)
def test_an_address_as_the_browser_or_git_has_it(address):
    assert repository(address) == "ada/assistant"


@pytest.mark.parametrize(
    "address",
    [
        "somewhere",
        "https://github.com/a",
        "https://github.com/a/b#c",
        "https://github.com/a/b?c=d",
        "https://github.com/a/b/tree/other",
        "https://github.com/a/b/c",
        "https://github.com/a/..",
        "https://github.com/a/b c",
        "https://github.com/a/b\nc",
        "https://github.com.example.org/a/b",
        "https://example.org/a/b",
        "http://github.com/a/b",
    ],
)
def test_another_address_is_refused_and_nothing_written(make, address, tmp_path):
    assert repository(address) == ""
    before = contents(tmp_path)
    done, _ = make("address", f"REPO_URL={address}")
    assert done.returncode and "make address REPO_URL=https://github.com/owner/name" in done.stderr
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for pattern in ("*.md", "**/*.ipynb") for path in folder.glob(pattern)}


def test_links_badges_and_notebooks_get_the_address_and_another_one_later(make, tmp_path):
    badge = "https://github.com/OWNER/REPOSITORY/actions/workflows/test.yml"
    with (tmp_path / "README.md").open("a") as readme:
        readme.write(f"\n[![test]({badge}/badge.svg)]({badge})\n")
    for name in ("ada/assistant", "ada/another.one"):
        done, _ = make("address", f"REPO_URL=https://github.com/{name}")
        assert not done.returncode, done.stderr
        readme = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert readme.count(f"research.google.com/github/{name}/blob/main/notebooks") == 4
        assert f"[![test](https://github.com/{name}/actions/workflows/test.yml/badge.svg)]" in readme
        assert all("OWNER" not in text.decode() for text in contents(tmp_path).values())
        notebooks = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.ipynb")]
        assert len(notebooks) == 8 and all(f"https://github.com/{name}" in text for text in notebooks)
        assert all(json.loads(text) for text in notebooks)


def test_other_projects_keep_their_address():
    text = (
        "https://github.com/tatsu-lab/alpaca https://github.com/a/b https://github.com/a/bc https://github.com/a/b.git."
    )
    assert rewrite(text, "a/b", "c/d") == text.replace("a/b ", "c/d ").replace("a/b.git", "c/d.git")


def test_without_an_address_it_is_the_remotes(make, tmp_path):
    done, _ = make("address")
    assert done.returncode and "no git remote `origin`" in done.stderr
    for command in (["init", "--quiet"], ["remote", "add", "origin", "git@github.com:ada/assistant.git"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    done, _ = make("address")
    assert not done.returncode, done.stderr
    assert "github/ada/assistant/blob" in (tmp_path / "README.md").read_text(encoding="utf-8")
