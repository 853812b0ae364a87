"""The README's commands are run somewhere, its links lead somewhere: python -m pytest tests/test_readme.py"""

import re
import subprocess

from conftest import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
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
}


def commands() -> list[str]:
    """Return the README's commands: lines of its shell blocks, whole, without comments and loops."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [line for line in lines if line and not line.startswith("for ") and line != "done"]


def test_each_command_is_run_somewhere():
    places = {}
    for command in commands():
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


def test_make_help_lists_every_target_that_the_readme_names():
    listed = subprocess.run(["make", "help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"make {target}\s", listed), target


def test_each_link_into_the_project_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (PROJECT / link).exists()] == []


def test_a_run_with_the_documents_recipe(tmp_path):
    """Notebook 02 on its own, as the driver hands it the recipe."""
    from alpaca_helpers.runs import read_manifest
    from alpaca_helpers.series import NOTEBOOKS, run_series

    parameters = {"profile": "pocket", "run": str(tmp_path / "document"), "recipe": "document"}
    assert read_manifest(run_series(parameters, NOTEBOOKS[1:2]))["data"]["recipe"] == "document"
