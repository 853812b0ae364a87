"""The notebooks as files: where they are, their parameters, and their cells run as a script."""

import ast
import json
from collections.abc import Iterable
from pathlib import Path

from . import PACKAGE, AlpacaError, project_folder

NAMES = ("01_base_model", "02_dataset_and_tokenizer", "03_lora_finetuning", "04_comparison_and_chat")

# those of the checkout that the working folder or the package lies in, else those that were installed with the package
_FOLDERS = [folder / "notebooks" for folder in (project_folder(), PACKAGE.parent, PACKAGE)]
_FOLDER = next((folder for folder in _FOLDERS if (folder / f"{NAMES[0]}.ipynb").is_file()), _FOLDERS[0])
NOTEBOOKS = [_FOLDER / f"{name}.ipynb" for name in NAMES]
FURTHER = [
    _FOLDER / "further" / f"{name}.ipynb"
    for name in ("sampling_and_examples", "inside_the_adapter", "what_tuning_changed")
]


def read_cells(notebook: Path, tag: str = "") -> list[dict]:
    """Return the notebook's cells, or those with the tag; AlpacaError where it cannot be read, or none has it.

    Each has its `cell_type`, its `source` as one text, its `id` and its `tags`.
    """
    try:
        cells = [
            {
                "cell_type": cell["cell_type"],
                "source": "".join(cell["source"]),
                "id": cell.get("id", ""),
                "tags": cell["metadata"].get("tags", []),
            }
            for cell in json.loads(notebook.read_bytes())["cells"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(notebook, error) from error
    if tag and not any(tag in cell["tags"] for cell in cells):
        raise AlpacaError(f"{notebook} has no cell tagged `{tag}`: take it from the project again.", "notebook-broken")
    return [cell for cell in cells if not tag or tag in cell["tags"]]


def notebook_parameters(notebook: Path) -> list[str]:
    """Return the names in the notebook's cell tagged `parameters`; errors as in `read_cells`."""
    source = "\n".join(cell["source"] for cell in read_cells(notebook, "parameters"))
    try:
        lines = ast.parse(source).body
    except SyntaxError as error:
        raise _broken(notebook, error) from error
    names = [ast.unparse(line.target) for line in lines if isinstance(line, ast.AnnAssign)]
    return names + [ast.unparse(line.targets[0]) for line in lines if isinstance(line, ast.Assign)]


def refuse_dropped(parameters: Iterable[str], notebooks: Iterable[Path]) -> None:
    """Raise AlpacaError for a parameter that none of the notebooks takes: it would be dropped in silence."""
    taken = {"profile"}.union(*map(notebook_parameters, notebooks))
    if dropped := ", ".join(sorted(set(parameters) - taken)):
        what = f"The notebooks to run take no {dropped}: leave it out, or run those that take it."
        raise AlpacaError(what, "unknown-parameter")


def run_cells(notebook: Path, tag: str, parameters: dict[str, object], until: str = "") -> dict:
    """Run the cells with the tag as a script, with these parameters, and return all names that they define.

    The cell of parameters is run first. With `until` it ends as soon as that name is defined.
    """
    names: dict = {}
    for cell in read_cells(notebook, "parameters") + read_cells(notebook, tag):
        exec(compile(cell["source"], f"{notebook.name}, cell {cell['id']}", "exec"), names)
        if "parameters" in cell["tags"]:
            names |= parameters
        if until and until in names:
            break
    return names


def _broken(notebook: Path, error: Exception) -> AlpacaError:
    reason = f"{type(error).__name__}: {error}"
    return AlpacaError(f"{notebook} cannot be read ({reason}): take it from the project again.", "notebook-broken")
