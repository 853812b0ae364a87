"""The four notebooks in one batch, by papermill: `python -m alpaca_helpers.series --help`."""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
import papermill
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from tqdm import tqdm

from . import AlpacaError, locate, project_folder
from .evaluation import comparison, conclusion
from .profiles import choose_profile
from .runs import PRODUCERS, artifact, content_hash, read_manifest, run_folder, write_record

QUIET = ["--log-level=ERROR"]  # ipykernel warns at each start that its local sockets are not encrypted
PROJECT = project_folder()
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("0*.ipynb"))


class ProgressFile:
    """Takes what the cells print and shows of it what a terminal wants to know: downloads and training steps."""

    def write(self, text: str) -> None:
        for line in text.splitlines():
            if line.startswith(("step ", "Downloading ", "The Hub is busy")):
                tqdm.write(f"    {line}")

    def flush(self) -> None:
        pass


def notebook_parameters(notebook: Path) -> list[str]:
    """Return the names in the notebook's cell tagged `parameters`."""
    return list(papermill.inspect_notebook(str(notebook)))


def check_parameters(given: dict[str, object]) -> None:
    """Raise AlpacaError for a parameter that no notebook has; papermill would only warn."""
    known = {name for notebook in NOTEBOOKS for name in notebook_parameters(notebook)}
    if unknown := sorted(set(given) - known):
        raise AlpacaError(f"No notebook has a parameter {unknown[0]!r}: choose among {', '.join(sorted(known))}.")


def run_series(parameters: dict[str, object], notebooks: Sequence[Path] | None = None) -> Path:
    """Execute the notebooks in order into the folder of the run that `parameters` names, and return that folder.

    A notebook is left alone while its cells, its parameters, the helpers, the files of model and dataset, what it left
    in the run and the notebooks before it are those of its last whole execution.

    Args:
        notebooks: those to execute; None: all.

    Raises AlpacaError with the sentence of the cell that failed.
    """
    notebooks = notebooks or NOTEBOOKS
    folder = run_folder(str(parameters["run"]))
    done = read_manifest(folder).get("notebooks", {})
    named = {key: parameters[key] for key in ("model", "dataset") if key in parameters}
    profile = choose_profile(str(parameters.get("profile", "auto")), **named)
    sources = [
        *sorted(Path(__file__).parent.rglob("*.py")),
        *(locate(path) for path in (profile.model, profile.dataset, profile.heldout) if path),
    ]
    made_of = _hash(*map(content_hash, sources))
    for number, notebook in enumerate(notebooks, 1):
        chosen = {key: value for key, value in parameters.items() if key in notebook_parameters(notebook)}
        made_of = _hash(made_of, _cells(notebook), json.dumps(chosen, sort_keys=True))
        executed = folder / notebook.name
        left = [executed, *(folder / name for name, maker in PRODUCERS.items() if maker == notebook.stem)]
        unchanged = done.get(notebook.stem) == made_of and all(path.exists() for path in left)
        print(f"[{number}/{len(notebooks)}] {notebook.stem}{': unchanged' if unchanged else ''}", flush=True)
        if unchanged:
            continue
        done = {name: mark for name, mark in done.items() if name < notebook.stem}
        write_record(folder, "notebooks", done)  # until it is through, this notebook and those after it are not done
        try:
            papermill.execute_notebook(
                notebook, executed, chosen, kernel_name="python3", extra_arguments=QUIET, stdout_file=ProgressFile()
            )
        except papermill.PapermillExecutionError as error:
            raise AlpacaError(f"{error.ename}: {error.evalue} [cell {error.exec_count} of {executed}]") from error
        done[notebook.stem] = made_of
        write_record(folder, "notebooks", done)
    return folder


def prepare(folder: Path, parameters: dict[str, object]) -> None:
    """Write copies of the notebooks with `parameters` injected and their stored outputs kept, for nbval to check.

    The stored outputs are the pocket's: for another profile only cells tagged `every-profile` are to be compared.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for notebook in NOTEBOOKS:
        chosen = {key: value for key, value in parameters.items() if key in notebook_parameters(notebook)}
        copy = parameterize_notebook(load_notebook_node(str(notebook)), chosen)
        for cell in copy.cells:
            tags = cell.metadata["tags"]
            if parameters["profile"] != "pocket" and not {"every-profile", "nbval-ignore-output"} & set(tags):
                tags.append("nbval-ignore-output")
        nbformat.write(copy, folder / notebook.name)


def refresh() -> None:
    """Execute the notebooks on the pocket and store their outputs in place, tidied."""
    with tempfile.TemporaryDirectory() as folder:
        executed = run_series({"profile": "pocket", "run": f"{folder}/pocket"})
        for notebook in NOTEBOOKS:
            shutil.copy(executed / notebook.name, notebook)
    tidy()


def tidy() -> None:
    """Clean the notebooks in place, and bring code and outputs of the French edition up to date."""
    for path in NOTEBOOKS:
        notebook = clean(nbformat.read(path, as_version=4))
        nbformat.write(notebook, path)
        french = path.parent / "fr" / path.name
        prose = {cell.id: cell.source for cell in nbformat.read(french, as_version=4).cells if cell.source}
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                if cell.id not in prose:
                    print(f"{french.relative_to(PROJECT)}: the cell {cell.id} is still in English: translate it there.")
                cell.source = prose.get(cell.id, cell.source)
        nbformat.write(notebook, french)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook without what belongs to one execution: timings, progress, widgets, injected parameters."""
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    kept = {"kernelspec", "accelerator", "colab"}
    notebook.metadata = {key: value for key, value in notebook.metadata.items() if key in kept}
    notebook.metadata["language_info"] = {"name": "python"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
    for count, cell in enumerate(code, 1):
        cell.execution_count = count
        cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    return notebook


def _is_progress(output: nbformat.NotebookNode) -> bool:
    widget = "application/vnd.jupyter.widget-view+json"
    return output.get("name") == "stderr" or widget in output.get("data", {})


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cells(notebook: Path) -> str:
    return json.dumps([cell.source for cell in nbformat.read(notebook, as_version=4).cells])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m alpaca_helpers.series", description=__doc__)
    parser.add_argument("--profile", default="auto", help="auto, pocket or gpt2-medium (auto)")
    parser.add_argument("--run", help="name of the run, or a path to its folder (the profile's name)")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="a notebook parameter, as papermill"
    )
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="only write copies for nbval to FOLDER")
    parser.add_argument("--refresh", action="store_true", help="store fresh outputs of the pocket in the notebooks")
    parser.add_argument("--tidy", action="store_true", help="clean the notebooks, update the French edition's code")
    options = parser.parse_args()
    if options.refresh or options.tidy:
        return refresh() if options.refresh else tidy()
    given = {key: _literal(value) for key, value in options.p}
    check_parameters(given)
    profile = choose_profile(str(given.get("profile", options.profile))).name
    run = str((options.prepare / "run").resolve()) if options.prepare else options.run or profile
    parameters = {"profile": profile, "run": run, **given}
    if options.prepare:
        return prepare(options.prepare, parameters)
    folder = run_series(parameters)
    metrics = json.loads(artifact(folder, "metrics.json").read_text(encoding="utf-8"))
    print(f"\n{comparison(metrics).to_string()}\n\n{conclusion(metrics)}\n\nThe executed notebooks are in {folder}.")


def _literal(value: str) -> object:
    """Return a command-line value as the literal it spells, else as text."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
    except ValueError:
        return value


if __name__ == "__main__":
    try:
        main()
    except AlpacaError as error:
        sys.exit(str(error))
