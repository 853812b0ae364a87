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
    """Return the notebook's cells, or those with the tag, each with its `source` as one text.

    Raises AlpacaError where the notebook cannot be read, or no cell has the tag.
    """
    try:
        cells = json.loads(notebook.read_bytes())["cells"]
        cells = [cell | {"source": "".join(cell["source"])} for cell in cells]
        cells = [cell for cell in cells if not tag or tag in cell["metadata"].get("tags", [])]
        if tag and not cells:
            raise ValueError(f"no cell is tagged `{tag}`")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{notebook} cannot be read ({type(error).__name__}: {error})"
        raise AlpacaError(f"{what}: take it from the project again.") from error
    return cells


def notebook_parameters(notebook: Path) -> list[str]:
    """Return the names in the notebook's cell tagged `parameters`; errors as in `read_cells`."""
    try:
        body = ast.parse(read_cells(notebook, "parameters")[0]["source"]).body
    except (SyntaxError, ValueError) as error:
        what = f"The cell of parameters in {notebook} is no Python ({error})"
        raise AlpacaError(f"{what}: correct it, or take it from the project again.") from error
    lines = [line for line in body if isinstance(line, ast.Assign | ast.AnnAssign)]
    return [ast.unparse(line.target if isinstance(line, ast.AnnAssign) else line.targets[0]) for line in lines]


def refuse_dropped(parameters: Iterable[str], notebooks: Iterable[Path]) -> None:
    """Raise AlpacaError for a parameter that none of the notebooks takes: it would be dropped in silence."""
    taken = {"profile"}.union(*map(notebook_parameters, notebooks))
    if dropped := ", ".join(sorted(set(parameters) - taken)):
        raise AlpacaError(f"The notebooks to run take no {dropped}: leave it out, or run those that take it.")


def run_cells(notebook: Path, tag: str, parameters: dict[str, object]) -> None:
    """Run the cell of parameters, with these, and the cells with the tag as a script."""
    given = {"id": "given", "source": "\n".join(f"{name} = {value!r}" for name, value in parameters.items())}
    names: dict = {}
    for cell in [*read_cells(notebook, "parameters"), given, *read_cells(notebook, tag)]:
        exec(compile(cell["source"], f"{notebook.name}, cell {cell['id']}", "exec"), names)  # noqa: S102 (the project's own)
