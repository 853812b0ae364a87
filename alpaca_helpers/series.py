"""A notebook's set-up, and the four notebooks in one batch, by papermill: `python -m alpaca_helpers.series --help`."""

import argparse
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from . import PACKAGE, AlpacaError, locate, pocket
from .batches import split_batch
from .cells import FURTHER, NAMES, NOTEBOOKS, notebook_parameters, read_cells, refuse_dropped
from .config import PROFILES, add_parameters, check_parameters, choose_profile, parse_parameters
from .console import ignore_known_warnings, run_command
from .files import check_disk_space, content_hash
from .lora import BASE, choose_targets
from .models import check_length, empty_model, fetch_model
from .report import comparison, conclusion
from .run import PRODUCERS, RUN_BYTES, Run

QUIET = ["--log-level=CRITICAL"]  # ipykernel warns of its local sockets, and tells at length of an interrupt
POCKET = PROFILES["pocket"]
PROMPT_TOKENS = 64  # room for a prompt beside the new tokens


class ProgressFile(io.TextIOBase):
    """Takes what the cells print and shows of it what a terminal wants to know: downloads and training steps."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.startswith(("step ", "Downloading ", "The Hub is busy", "Note: ", "The training ")):
                tqdm.write(f"    {line}")
        return len(text)


def open_run(notebook: str, values: Mapping[str, object]) -> tuple[SimpleNamespace, Path]:
    """Return the settings of an open notebook, and the folder of its run: called by its one cell of set-up.

    The settings are the parameters in `values`, a notebook's `globals()`, checked, and what they leave open: in
    notebooks 01 and 02 the profile's values (`model`, `dataset`, …), in the others those that the run was made with.
    `model_path` is the base model's folder, ready for `from_pretrained`. Where the run lacks what earlier notebooks
    make, these are run first, unless `run_earlier` is false. Raises AlpacaError for a bad parameter, for a model that
    is missing, broken or too short for the tokens asked for, and for a run whose artifacts are missing or damaged.
    """
    ignore_known_warnings()
    path = next(path for path in [*NOTEBOOKS, *FURTHER] if path.stem == notebook)
    given = check_parameters({name: values[name] for name in notebook_parameters(path) if name in values})
    profile = choose_profile(given["profile"], given.get("model_name"), given.get("dataset_name"))
    run, made = Run.named(given["run"] or profile.name), asdict(profile)
    # of the artifacts, those of notebooks before this one; the further ones, which come later by name, need as 04 does
    if needs := [part for part, by in PRODUCERS.items() if by < notebook and part != "metrics.json"]:
        if given["run_earlier"]:
            run_earlier_notebooks(needs, profile.name, given["run"])
        run.artifact("data")
        made = dict.fromkeys(made) | run.record(needs[-1])  # an early version's record lacks some
    settings = SimpleNamespace(**given | made | {name: value for name, value in given.items() if value is not None})
    settings.model_path = fetch_model(settings.model, settings.model_revision)
    if not locate(settings.model).is_dir():  # one on the Hub, in a folder of its cache that is named after the commit
        settings.model_revision = settings.model_path.name
    written = given["max_new_tokens"] + PROMPT_TOKENS if "max_new_tokens" in given else 0
    check_length(settings.model_path, max(written, given.get("max_length", 0)))
    if given.get("other_run"):
        other = Run.named(given["other_run"], make=False)
        other.record("adapter")
        if content_hash(other.folder / "adapter" / BASE) != content_hash(run.folder / "adapter" / BASE):
            what = f"The run {other.folder} was trained on another base model than {run.folder}"
            raise AlpacaError(f"{what}: take another `other_run`.")
        settings.other_run = other.folder
    elif (settings.model, settings.heldout) == (POCKET.model, POCKET.heldout):
        settings.other_run = pocket.DOCUMENT
    if notebook == NAMES[2]:
        settings.rows_at_once, settings.accumulation = split_batch(settings.batch_size, settings.micro_batch_size)
        settings.target_modules = choose_targets(empty_model(settings.model_path), given["target_modules"])
    return settings, run.folder


def run_earlier_notebooks(needs: list[str], profile: str, run: str = "") -> None:
    """Run the notebooks that make those of the artifacts `needs` that the run lacks; errors as in `run_series`."""
    folder = Run.named(run or profile).folder
    if missing := {PRODUCERS[part]: part for part in needs if not Run(folder).artifact_hash(part)}:
        first = f"no {' and no '.join(missing.values())}: running {' and '.join(missing)} first"
        print(f"The run {folder} has {first}. (If you have such a run elsewhere, set `run` to its folder.)", flush=True)
        run_series({"profile": profile, "run": run}, [path for path in NOTEBOOKS if path.stem in missing])


def run_series(parameters: Mapping[str, object], notebooks: Sequence[Path] | None = None) -> Path:
    """Execute the notebooks in order into the folder of the run that `parameters` names, and return that folder.

    A notebook is skipped while its cells, its parameters, the helpers, the files of model and dataset, the other run's
    adapter, its artifacts and the notebooks before it are those of its last complete execution. Raises AlpacaError for
    a bad parameter or other run, and with the sentence of the cell that failed.
    """
    chosen = check_parameters(parameters)
    refuse_dropped(chosen, notebooks or NOTEBOOKS)
    profile = choose_profile(chosen.get("profile", "auto"), chosen.get("model_name"), chosen.get("dataset_name"))
    chosen |= {"profile": profile.name, "run": chosen.get("run") or profile.name, "run_earlier": False}
    run = Run.named(chosen["run"])
    if chosen.get("other_run"):
        Run.named(chosen["other_run"], make=False).record("adapter")
    commit = "" if locate(profile.model).is_dir() else fetch_model(profile.model, profile.model_revision).name
    used = [locate(path) for path in (profile.model, profile.dataset, profile.heldout) if path]
    ours = [PACKAGE.with_name(f"alpaca_{name}") for name in ("helpers", "lessons", "export")]
    used += [path for package in ours for path in sorted(package.rglob("*.py"))]
    used += [PACKAGE / "card.md", pocket.HELDOUT, pocket.DOCUMENT / "adapter"]
    with run.lock(), check_disk_space(run.folder, needed=RUN_BYTES):
        _execute_changed(notebooks or NOTEBOOKS, chosen, run, _hash(commit, *map(content_hash, used)))
    return run.folder


def _execute_changed(notebooks: Sequence[Path], parameters: dict[str, object], run: Run, inputs: str) -> None:
    """Execute the notebooks that are not done; `inputs` is the hash of all that the first one is made from."""
    done = run.manifest().get("notebooks", {})
    for number, notebook in enumerate(notebooks, 1):
        name, cells = notebook.stem, _code(notebook)
        chosen = {key: parameters[key] for key in notebook_parameters(notebook) if key in parameters}
        inputs = _hash(inputs, *cells, json.dumps(chosen, sort_keys=True))
        if notebook in FURTHER:
            inputs = _hash(inputs, run.artifact_hash("adapter"))
        if other := chosen.get("other_run"):
            inputs = _hash(inputs, Run.named(str(other), make=False).artifact_hash("adapter"))
        executed = run.folder / notebook.name
        unchanged = done.get(name) == _mark(inputs, name, cells, run, chosen) and len(_code(executed)) >= len(cells)
        print(f"[{number}/{len(notebooks)}] {name}{': unchanged' if unchanged else ''}", flush=True)
        if not unchanged:  # until it is through, this notebook and those after it are not done
            done = {each: mark for each, mark in done.items() if each != name and (each < name or notebook in FURTHER)}
            run.write_record("notebooks", done)
            _keep_changed(executed, run)
            run.write_record("executed", run.manifest().get("executed", {}) | {name: _hash(*cells)})
            _execute(notebook, executed, chosen)
            run.write_record("notebooks", done := done | {name: _mark(inputs, name, cells, run, chosen)})


def _keep_changed(executed: Path, run: Run) -> None:
    """Rename an executed notebook whose cells are not those that the manifest records: the reader has changed it."""
    cells = run.manifest().get("executed", {}).get(executed.stem)
    if os.path.lexists(executed) and _hash(*_code(executed)) != cells:
        places = (executed.with_stem(f"{executed.stem}-changed-{number}") for number in count(1))
        kept = executed.rename(next(place for place in places if not os.path.lexists(place)))
        print(f"Note: {executed} was changed since it was executed, and is kept as {kept.name}.", flush=True)


def _mark(inputs: str, notebook: str, cells: Sequence[str], run: Run, chosen: Mapping) -> str:
    """Return the hash of what a notebook was made from, of what it left, and of the manifest's records of that."""
    manifest, made = run.manifest(), [part for part, by in PRODUCERS.items() if by == notebook]
    left = [*made, *(f"pictures/{name}" for name in re.findall(r"\w+\.png", "".join(cells)))]
    if "metrics.json" in made:
        left.append("adapter/README.md")  # the card, now with the metrics
    if "adapter" in made and (chosen.get("merged") or chosen.get("gguf")):
        left.append("merged")
    if "adapter" in made and chosen.get("gguf"):
        left += manifest.get("gguf", {})
    return _hash(inputs, *map(run.artifact_hash, left), json.dumps([manifest.get(part) for part in made]))


def _execute(notebook: Path, executed: Path, parameters: dict[str, object]) -> None:
    """Execute one notebook and print what it took; raise AlpacaError with the sentence of the cell that failed."""
    import papermill  # only where notebooks are run: not everybody who opens one has it

    options = {"kernel_name": "python3", "extra_arguments": QUIET, "stdout_file": ProgressFile()}
    try:
        made = papermill.execute_notebook(notebook, executed, parameters, **options)
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from error
        raise AlpacaError(f"{error.ename}: {error.evalue} [cell {error.exec_count} of {executed}]") from error
    except RuntimeError as error:
        if type(error).__name__ != "DeadKernelError":  # nbclient's, which papermill brings along
            raise
        remedy = "free some memory, or take a smaller `micro_batch_size` or model, and run this again"
        raise AlpacaError(f"The kernel of {executed} was killed: {remedy}.") from error
    took = [(cell.metadata.papermill.duration or 0, cell.source) for cell in made.cells if cell.source.strip()]
    longest = [f"{seconds:.0f} s {code.splitlines()[-1].strip():.40}" for seconds, code in sorted(took)[:-4:-1]]
    print(f"    {made.metadata.papermill.duration:.0f} s; the longest cells: {'; '.join(longest)}", flush=True)


def _code(notebook: Path) -> list[str]:
    """Return type and source of each of a notebook's cells but papermill's; none where it is missing, or cut."""
    try:
        cells = [cell for cell in read_cells(notebook) if "injected-parameters" not in cell["metadata"].get("tags", [])]
        return [f"{cell['cell_type']} {cell['source']}" for cell in cells]
    except AlpacaError:
        return []


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # an older ipykernel warns at length of its debugger
    parser = argparse.ArgumentParser("python -m alpaca_helpers.series", description="Run the notebooks in one batch.")
    parser.add_argument("--profile", default="auto", help="auto, pocket or gpt2-medium (auto)")
    parser.add_argument("--run", help="name of the run, or a path to its folder (the profile's name)")
    parser.add_argument("--further", action="store_true", help="the notebooks that go deeper, on a finished run")
    add_parameters(parser)
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("profile", "run")}
    given = {name: value for name, value in given.items() if value != parser.get_default(name)}
    folder = run_series(parse_parameters(options.p, **given), FURTHER if options.further else NOTEBOOKS)
    if not options.further:
        metrics = Run(folder).metrics()
        print(f"\n{comparison(metrics).to_string()}\n\n{conclusion(metrics)}\n")
    print(f"The executed notebooks are in {folder}.")


def command() -> None:
    """Run the command line and exit."""
    run_command(main, "Interrupted: what is done is kept, and the same command goes on from there.")


if __name__ == "__main__":
    command()
