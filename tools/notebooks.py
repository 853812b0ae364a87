"""What authors do with the notebooks: `python -m tools.notebooks --help`.

`.ipynb` is the only source. The stored outputs are the pocket's, and the French edition has the same code and outputs.
"""

import argparse
import copy
import shutil
import tempfile
from pathlib import Path

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from alpaca_helpers import AlpacaError
from alpaca_helpers.cells import FURTHER, NOTEBOOKS, notebook_parameters
from alpaca_helpers.config import choose_profile
from alpaca_helpers.console import run_command
from alpaca_helpers.files import atomic_folder
from alpaca_helpers.series import run_series


def write_for_nbval(folder: Path, parameters: dict[str, object]) -> None:
    """Write copies of the notebooks with `parameters` injected and their stored outputs kept, for nbval to check.

    The stored outputs are the pocket's: for another profile only cells tagged `every-profile` are to be compared.
    Raises AlpacaError for a folder with other files than such copies.
    """
    with atomic_folder(folder.resolve()) as part:
        for notebook in [*NOTEBOOKS, *FURTHER]:
            chosen = {key: value for key, value in parameters.items() if key in notebook_parameters(notebook)}
            prepared = parameterize_notebook(load_notebook_node(str(notebook)), chosen)
            for cell in prepared.cells:
                tags = cell.metadata["tags"]
                if parameters["profile"] != "pocket" and not {"every-profile", "nbval-ignore-output"} & set(tags):
                    tags.append("nbval-ignore-output")
            nbformat.write(prepared, part / notebook.name)


def refresh() -> None:
    """Execute the notebooks on the pocket and store their outputs in place, cleaned.

    Raises AlpacaError for a notebook that was changed meanwhile, before any is replaced.
    """
    before = {notebook: notebook.read_bytes() for notebook in [*NOTEBOOKS, *FURTHER]}
    with tempfile.TemporaryDirectory() as folder:
        executed = run_series({"profile": "pocket", "run": f"{folder}/pocket"}, [*NOTEBOOKS, *FURTHER])
        for notebook, content in before.items():
            if notebook.read_bytes() != content:
                raise AlpacaError(f"{notebook} was changed while it was executed, and stays as it is: try again.")
        for notebook in before:
            shutil.copy(executed / notebook.name, notebook)
    clean_all()


def clean_all() -> None:
    """Clean the notebooks in place, and bring code and outputs of the French edition up to date."""
    cleaned: dict[Path, nbformat.NotebookNode] = {}
    for path in [*NOTEBOOKS, *FURTHER]:
        french = NOTEBOOKS[0].parent / "fr" / path.relative_to(NOTEBOOKS[0].parent)
        cleaned |= dict(zip((path, french), _clean_pair(path, french)))
    for path, notebook in cleaned.items():  # after all could be cleaned
        nbformat.write(notebook, path)


def _clean_pair(path: Path, french: Path) -> tuple[nbformat.NotebookNode, nbformat.NotebookNode]:
    """Return the cleaned notebook, and its French edition: the prose of its own, by the cells' ids."""
    notebook, other = nbformat.read(path, as_version=4), nbformat.read(french, as_version=4)
    restore_ids(notebook, other, path)
    restore_ids(other, notebook, french)
    notebook = clean(notebook)
    translated = copy.deepcopy(notebook)
    prose = {cell.id: cell.source for cell in other.cells if cell.source}
    known = {cell.id for cell in notebook.cells}
    for cell in other.cells:
        if cell.cell_type == "markdown" and cell.id not in known:
            what = f"{french} has a cell of prose, {cell.id}, that {path.name} has not"
            raise AlpacaError(f"{what}: add it there too, or delete it.")
    for cell in translated.cells:
        if cell.cell_type == "markdown":
            if cell.id not in prose:
                print(f"fr/{path.name}: the cell {cell.id} is still in English: translate it there.")
            cell.source = prose.get(cell.id, cell.source)
    return notebook, translated


def restore_ids(notebook: nbformat.NotebookNode, other: nbformat.NotebookNode, path: Path) -> None:
    """Give cells that an editor saved without ids (before nbformat 4.5) those of the other edition, in their order.

    Raises AlpacaError where the two have not the same cells.
    """
    if all("id" in cell for cell in notebook.cells):
        return
    kinds, others = ([cell.cell_type for cell in each.cells] for each in (notebook, other))
    if kinds != others or not all("id" in cell for cell in other.cells):
        what = f"{path} was saved without the cells' ids, and has not the cells of its other edition"
        raise AlpacaError(f"{what}: add or remove cells in an editor that keeps ids, such as JupyterLab.")
    for cell, like in zip(notebook.cells, other.cells):
        cell.id = like.id
    notebook.nbformat_minor = 5


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook without what belongs to one execution: timings, progress, widgets, injected parameters."""
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    kept = {"kernelspec", "accelerator", "colab"}
    notebook.metadata = {key: value for key, value in notebook.metadata.items() if key in kept}
    notebook.metadata["language_info"] = {"name": "python", "file_extension": ".py"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
    for count, cell in enumerate(code, 1):
        cell.execution_count = count
        cell.outputs = _joined([output for output in cell.outputs if not _is_progress(output)])
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    return notebook


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Return the outputs, printed text in one piece: it comes in as many as it takes the kernel."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _is_progress(output: nbformat.NotebookNode) -> bool:
    widget = "application/vnd.jupyter.widget-view+json"
    return output.get("name") == "stderr" or widget in output.get("data", {})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__.splitlines()[0])
    parser.add_argument("--refresh", action="store_true", help="execute all on the pocket, store the outputs, clean")
    parser.add_argument("--clean", action="store_true", help="clean them, and update the French edition's code")
    parser.add_argument(
        "--for-nbval", type=Path, metavar="FOLDER", help="write copies there, with a new run of their own"
    )
    parser.add_argument("--profile", default="pocket", help="of those copies (pocket)")
    options = parser.parse_args()
    if options.refresh:
        refresh()
    elif options.clean:
        clean_all()
    elif options.for_nbval:
        run = tempfile.mkdtemp(prefix="alpaca-nbval-")  # a new one each time: nothing is to be removed
        write_for_nbval(options.for_nbval, {"profile": choose_profile(options.profile).name, "run": run})
    else:
        parser.error("choose what to do")


if __name__ == "__main__":
    run_command(main)
