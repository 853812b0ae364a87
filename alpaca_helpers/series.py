"""The four notebooks in one batch, by papermill: `python -m alpaca_helpers.series --help`."""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
import papermill
from tqdm import tqdm

from . import AlpacaError, locate, project_folder
from .evaluation import comparison, conclusion
from .profiles import choose_profile
from .runs import PRODUCERS, artifact, content_hash, read_manifest, run_folder, write_record

QUIET = ["--log-level=ERROR"]  # ipykernel warns at each start that its local sockets are not encrypted
NAMES = ("01_base_model", "02_dataset_and_tokenizer", "03_lora_finetuning", "04_comparison_and_chat")
NOTEBOOKS = [project_folder() / "notebooks" / f"{name}.ipynb" for name in NAMES]


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
        raise AlpacaError(
            f"No notebook has a parameter {unknown[0]!r}: choose among {', '.join(sorted(known))}.", "unknown-parameter"
        )


def run_series(parameters: dict[str, object], notebooks: Sequence[Path] | None = None) -> Path:
    """Execute the notebooks in order into the folder of the run that `parameters` names, and return that folder.

    A notebook is skipped while its cells, its parameters, the helpers, the files of model and dataset, what it left
    in the run and the notebooks before it are those of its last complete execution.

    Args:
        notebooks: those to execute; None: all.

    Raises AlpacaError with the sentence of the cell that failed.
    """
    notebooks = notebooks or NOTEBOOKS
    folder = run_folder(str(parameters["run"]))
    done = read_manifest(folder).get("notebooks", {})
    model, dataset = (str(parameters[key]) if parameters.get(key) else None for key in ("model", "dataset"))
    profile = choose_profile(str(parameters.get("profile", "auto")), model, dataset)
    sources = [
        *sorted(Path(__file__).parent.rglob("*.py")),
        *(locate(path) for path in (profile.model, profile.dataset, profile.heldout) if path),
    ]
    inputs = _hash(*map(content_hash, sources))
    for number, notebook in enumerate(notebooks, 1):
        chosen = {key: value for key, value in parameters.items() if key in notebook_parameters(notebook)}
        inputs = _hash(inputs, _cells(notebook), json.dumps(chosen, sort_keys=True))
        executed = folder / notebook.name
        left = [executed, *(folder / name for name, maker in PRODUCERS.items() if maker == notebook.stem)]
        unchanged = done.get(notebook.stem) == inputs and all(path.exists() for path in left)
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
            raise AlpacaError(
                f"{error.ename}: {error.evalue} [cell {error.exec_count} of {executed}]", "cell-failed"
            ) from error
        done[notebook.stem] = inputs
        write_record(folder, "notebooks", done)
    return folder


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cells(notebook: Path) -> str:
    return json.dumps([cell.source for cell in nbformat.read(notebook, as_version=4).cells])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m alpaca_helpers.series", description=__doc__)
    parser.add_argument("--profile", default="auto", help="auto, pocket or gpt2-medium (auto)")
    parser.add_argument("--run", help="name of the run, or a path to its folder (the profile's name)")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="a notebook parameter, as papermill"
    )
    options = parser.parse_args()
    given = {key: _literal(value) for key, value in options.p}
    check_parameters(given)
    profile = choose_profile(str(given.get("profile", options.profile))).name
    folder = run_series({"profile": profile, "run": options.run or profile, **given})
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
