"""The committed notebooks: hygiene, and that what nbval checks means something."""

import ast
import json
import re

import nbformat
import pytest
from conftest import PROJECT

from alpaca_helpers.series import NOTEBOOKS

IGNORED = "nbval-ignore-output"
LOCAL_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|Users|content|work|mnt)/|(?<![A-Za-z])[A-Z]:\\")
HEADINGS = {
    "01": ["# 1. "],
    "02": ["# 2. ", "## 2.1 ", "## 2.2 "],
    "03": ["# 3. ", "## 3.1 ", "## 3.2 ", "## 3.3 "],
    "04": ["# 4. ", "## 4.1 ", "## 4.2 ", "## 4.3 "],
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    content = nbformat.read(request.param, as_version=4)
    nbformat.validate(content)
    content.name = request.param.stem
    return content


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_there_are_four():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


def test_headings_are_the_documents(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    numbered = [line for line in text.splitlines() if re.match(r"#+ \d", line)]
    wanted = HEADINGS[notebook.name[:2]]
    assert len(numbered) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(numbered, wanted))
    assert "## What we saw" in text


def test_one_flat_cell_of_typed_parameters_comes_first(notebook):
    tagged = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    assert tagged == code_cells(notebook)[:1]
    for line, node in zip(tagged[0].source.splitlines(), ast.parse(tagged[0].source).body, strict=True):
        assert isinstance(node, ast.AnnAssign) and "  # " in line
        ast.literal_eval(node.value)


def test_checked_cells_have_stored_outputs(notebook):
    checked = [cell for cell in code_cells(notebook) if IGNORED not in tags(cell) and "parameters" not in tags(cell)]
    comparable = [cell for cell in checked if cell.outputs]
    silent = [cell.source for cell in checked if not cell.outputs]
    assert len(comparable) >= 5
    assert not silent, "a checked cell without a stored output passes whatever it does"


def test_outputs_are_clean(notebook):
    assert not set(notebook.metadata) - {"kernelspec", "language_info", "accelerator", "colab"}
    for count, cell in enumerate(code_cells(notebook), 1):
        assert cell.execution_count == count
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            text = json.dumps(
                [output.get("text"), {k: v for k, v in output.get("data", {}).items() if k[:5] != "image"}]
            )
            assert not LOCAL_PATH.search(text), text


def test_cells_are_short(notebook):
    def lines(cell):
        return sum(1 for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#"))

    sizes = sorted(map(lines, code_cells(notebook)[1:]))
    assert sizes[-1] <= 15 and sizes[len(sizes) // 2] <= 5


def test_the_template_is_spelled_in_one_module():
    spelled = [
        path.name for path in (PROJECT / "alpaca_helpers").rglob("*.py") if "ponse:" in path.read_text(encoding="utf-8")
    ]
    assert spelled == ["prompts.py"]


# The French edition


def test_the_french_edition_differs_in_its_prose_alone(notebook):
    french = nbformat.read(PROJECT / "notebooks" / "fr" / f"{notebook.name}.ipynb", as_version=4)
    assert french.metadata == notebook.metadata
    assert [cell.id for cell in french.cells] == [cell.id for cell in notebook.cells]
    for cell, english in zip(french.cells, notebook.cells):
        if cell.cell_type == "code":
            assert cell == english, cell.id
        else:
            assert cell.source != english.source, f"{cell.id} is still in English"
            code = re.compile(r"`[^`]+`|\$[^$]+\$|\]\([^)]+\)")  # code, formulas, links
            assert sorted(code.findall(cell.source)) == sorted(code.findall(english.source)), cell.id
