"""The pages' commands are run somewhere, their links lead somewhere: python -m pytest tests/test_readme.py"""

import re
import subprocess
from pathlib import Path

import pytest
from support import PROJECT

README = PROJECT / "README.md"
DOCS = sorted((PROJECT / "docs").glob("*.md"))
PAGES = [README, *DOCS, PROJECT / "CONTRIBUTING.md", PROJECT / "tests" / "README.md"]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
CI = (PROJECT / ".ci" / "run").read_text(encoding="utf-8")

# Where each command is run: by .ci/run, as it stands, or in small by a test.
RUN_BY = {
    "make run": "ci",
    "make test": "ci",
    "make run PROFILE=gpt2-medium": "test_hub.py::test_the_whole_series_from_the_stand_in",
    'make run RUN=mine PARAMS="-p dataset my_rows.json"': "ci",
    'make run RUN=large PROFILE=gpt2-medium PARAMS="-p model openai-community/gpt2-large -p micro_batch_size 4"': (
        "test_hub.py::test_the_whole_series_from_the_stand_in"
    ),
    'make run RUN=document PARAMS="-p recipe document"': "test_readme.py::test_a_run_with_the_documents_recipe",
    ".venv/bin/python -m alpaca_helpers.chat --run pocket": "test_terminal.py::test_streams_stops_at_ctrl_c",
    '.venv/bin/python -m alpaca_helpers.chat --run pocket --once "What is the capital of France?"': "ci",
    'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[test]"': "ci",
    "mkdir -p runs/pocket": "ci",
    ".venv/bin/papermill notebooks/$n.ipynb runs/pocket/$n.ipynb -p profile pocket": "ci",
    ".venv/bin/pytest --nbval": "ci",
    ".venv/bin/python -m alpaca_helpers.series --profile gpt2-medium --run rank-$rank -p lora_rank $rank": (
        "test_hub.py::test_the_whole_series_from_the_stand_in"
    ),
    'make table RUNS="rank-4 rank-8 rank-16"': "ci",
    ".venv/bin/torchrun --nproc-per-node 4 -m alpaca_helpers.training runs/mine": (
        "test_distributed.py::test_two_processes"
    ),
    ".venv/bin/lm_eval": "by hand",  # a large package of its own
    'pip install "transformers[serving]"': "by hand",  # a server, and what it needs
    "transformers serve runs/pocket/merged --device cpu --port 8000": "by hand",
    "curl localhost:8000/v1/chat/completions": "by hand",
}


def shell_commands(text: str) -> list[str]:
    """Return the commands of a page: lines of its shell blocks, whole, without comments and loops."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = re.sub(r"\s*\\\n\s*", " ", "\n".join(blocks)).splitlines()
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [line for line in lines if line and not line.startswith("for ") and line != "done"]


def anchors(text: str) -> set[str]:
    """Return the names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def targets() -> list[str]:
    listed = subprocess.run(["make", "help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^  make ([a-z-]+) ", listed, re.MULTILINE)


def test_the_readme_has_at_most_900_words():
    assert len(TEXTS[README].split()) <= 900


def test_each_command_is_run_somewhere():
    places = {}
    for command in (command for page in [README, *DOCS] for command in shell_commands(TEXTS[page])):
        known = [command] if command in RUN_BY else [key for key in RUN_BY if command.startswith(f"{key} ")]
        assert len(known) == 1, f"{command}: {known}"
        places[known[0]] = RUN_BY[known[0]]
    assert places == RUN_BY
    for command, place in places.items():
        if place == "ci":
            assert command in CI, command
        elif place != "by hand":
            file, name = place.split("::")
            assert f"def {name}" in (PROJECT / "tests" / file).read_text(encoding="utf-8"), place


def test_make_help_lists_every_target_that_the_pages_name(targets):
    named = {target for text in TEXTS.values() for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert len(named) > 5 and named - set(targets) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_each_link_and_picture_of_the_project_is_there(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(TEXTS[target]), link
    for published in re.findall(r"OWNER/REPOSITORY/(?:blob/main|actions)/([\w./]+?)(?:/badge\.svg)?\)", TEXTS[page]):
        assert any((PROJECT / start / published).exists() for start in ("", ".github")), published


def test_each_picture_is_shown_or_linked():
    linked = {Path(path).name for text in TEXTS.values() for path in re.findall(r"pictures/([\w.]+)\)", text)}
    assert {path.name for path in (PROJECT / "docs" / "pictures").iterdir()} == linked


def test_the_glossary_says_the_same_in_both_languages():
    english, french = (TEXTS[PROJECT / "docs" / name] for name in ("glossary.md", "glossaire.md"))
    for pattern in (r"^## Notebook \d\d|^- (?:\*\*)?", r"https?:[^)]+|\w+\.ipynb", r"`[^`]+`", r"\b(?:19|20)\d\d\b"):
        assert re.findall(pattern, french, re.MULTILINE) == re.findall(pattern, english, re.MULTILINE)
    assert french.count("**") > 80


def test_figures_stand_under_their_command_and_machine(targets):
    """Each part of the measurements opens with a line of commands that exist, and the machine."""
    introduction, *parts = TEXTS[PROJECT / "docs" / "measurements.md"].split("\n## ")
    machines = [*re.findall(r"- \*\*(.*?)\*\*", introduction), "on two cores"]
    assert len(parts) > 5 and len(machines) == 4
    for part in parts:
        opening = part.splitlines()[2]
        commands = re.findall(r"`([^`]+)`", opening)
        assert commands and any(machine in opening for machine in machines), opening
        for tool, *arguments in (command.split() for command in commands):
            assert tool != "make" or arguments[0] in targets, opening
            assert tool != "python" or arguments[0] == "-X" or (PROJECT / arguments[0]).exists(), opening


def test_each_fault_of_the_table_has_its_tests():
    table = re.sub(r" \([^)]*\)", "", TEXTS[PROJECT / "tests" / "README.md"])
    rows = re.findall(r"^\|.*\| (test_.*) \|$", table, re.MULTILINE)
    assert len(rows) > 40
    for file, names in (part.partition(":")[::2] for row in rows for part in row.split("; ")):
        text = (PROJECT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"def test_\w*{name}", text), f"{file}: {name}"


@pytest.mark.integration
def test_a_run_with_the_documents_recipe(tmp_path):
    """Notebook 02 on its own, as the driver hands it the recipe."""
    from alpaca_helpers.runs import read_manifest
    from alpaca_helpers.series import NOTEBOOKS, run_series

    parameters = {"profile": "pocket", "run": str(tmp_path / "document"), "recipe": "document"}
    assert read_manifest(run_series(parameters, NOTEBOOKS[1:2]))["data"]["recipe"] == "document"
