"""A notebook's set-up, and the four notebooks in one batch, by papermill: `python -m alpaca_helpers.series --help`."""

import argparse
import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from . import PACKAGE, AlpacaError, locate, pocket
from .batches import split_batch
from .cells import FURTHER, NAMES, NOTEBOOKS, notebook_parameters, read_cells, refuse_dropped
from .config import PROFILES, add_parameters, check_parameters, choose_profile, parse_parameters
from .console import ignore_known_warnings, run_command
from .files import NO_SPACE, check_disk_space, content_hash
from .lora import BASE, choose_targets
from .models import check_length, empty_model, fetch_model
from .report import comparison, conclusion
from .run import PRODUCERS, RUN_BYTES, Run

QUIET = ["--log-level=CRITICAL"]  # ipykernel warns of its local sockets, and tells at length of an interrupt
NEEDS = {"data": NAMES[2:3], "adapter": (NAMES[3], *(path.stem for path in FURTHER))}  # what a notebook builds on
RECORD = "manifest.json: "  # before the name of a record in it, among the files that a notebook left
PROMPT_TOKENS = 64  # room for a prompt beside the new tokens


class ProgressFile:
    """Takes what the cells print and shows of it what a terminal wants to know: downloads and training steps."""

    def write(self, text: str) -> None:
        for line in text.splitlines():
            if line.startswith(("step ", "Downloading ", "The Hub is busy", "Note: ", "The training ")):
                tqdm.write(f"    {line}")

    def flush(self) -> None:
        pass


def open_run(notebook: str, values: Mapping[str, object]) -> tuple[SimpleNamespace, Path]:
    """Return the settings of an open notebook, and the folder of its run: what its one cell of set-up calls.

    The settings are the notebook's parameters, checked, and what they leave open: in notebooks 01 and 02 the
    profile's values (`model`, `dataset`, …), in the others those that the run was made with. `model_path` is the base
    model's folder, ready for `from_pretrained`.

    Args:
        notebook: its name, such as `03_lora_finetuning`.
        values: at least the notebook's parameters by name; a notebook passes `globals()`.

    Makes what is missing: a model on the Hub is downloaded, and the earlier notebooks are run where the run lacks what
    they make, unless `run_earlier` is false. Raises AlpacaError for a bad parameter, for a model that is missing,
    broken or too short for the tokens asked for, and for a run whose artifacts are missing or damaged.
    """
    ignore_known_warnings()
    path = next(path for path in [*NOTEBOOKS, *FURTHER] if path.stem == notebook)
    given = check_parameters({name: values[name] for name in notebook_parameters(path) if name in values})
    needs = next((part for part, names in NEEDS.items() if notebook in names), "")
    profile = choose_profile(given["profile"], given.get("model_name"), given.get("dataset_name"))
    run = Run.named(given["run"] or profile.name)
    made = asdict(profile)
    if needs:
        if given["run_earlier"]:
            run_earlier_notebooks(notebook, given["profile"], given["run"])
        run.artifact("data")
        made = dict.fromkeys(made) | run.record(needs)  # an early version's record lacks some
    settings = SimpleNamespace(**given | made | {name: value for name, value in given.items() if value is not None})
    settings.model_path = fetch_model(settings.model, settings.model_revision)
    if not locate(settings.model).is_dir():  # one on the Hub, in a folder of its cache that is named after the commit
        settings.model_revision = settings.model_path.name
    written = given["max_new_tokens"] + PROMPT_TOKENS if "max_new_tokens" in given else 0
    check_length(settings.model_path, max(written, given.get("max_length", 0)))
    if "other_run" in given:
        settings.other_run = _other_run(settings, run.folder)
    if notebook == NAMES[2]:
        settings.rows_at_once, settings.accumulation = split_batch(settings.batch_size, settings.micro_batch_size)
        settings.target_modules = choose_targets(empty_model(settings.model_path), given["target_modules"])
    return settings, run.folder


def _other_run(settings: SimpleNamespace, folder: Path) -> Path | None:
    """Return the folder of the finished run to compare with, if any: the one named, else the pocket's own."""
    if settings.other_run:
        other = Run.named(settings.other_run, make=False)
        other.record("adapter")
        if content_hash(other.folder / "adapter" / BASE) != content_hash(folder / "adapter" / BASE):
            what = f"The run {other.folder} was trained on another base model than {folder}: take another `other_run`."
            raise AlpacaError(what, "other-base")
        return other.folder
    ours = PROFILES["pocket"]
    return pocket.DOCUMENT if (settings.model, settings.heldout) == (ours.model, ours.heldout) else None


def run_earlier_notebooks(notebook: str, profile: str = "auto", run: str = "") -> None:
    """Run the notebooks before the open `notebook` whose artifacts the run lacks, with the profile's settings.

    Says so in one line, or does nothing. Raises AlpacaError with the sentence of the cell that failed.
    """
    name = choose_profile(profile).name
    earlier = Run.named(run or name)
    end = NAMES[3] if notebook in {path.stem for path in FURTHER} else notebook
    missing = {by: made for made, by in PRODUCERS.items() if by < end and not earlier.artifact_hash(made)}
    if missing:
        what = " and ".join(f"no {made}" for made in missing.values())
        first = f"running {' and '.join(missing)} first"
        elsewhere = "(If you have such a run elsewhere, set `run` to its folder.)"
        print(f"The run {earlier.folder} has {what}: {first}. {elsewhere}", flush=True)
        run_series({"profile": name, "run": run or name}, [path for path in NOTEBOOKS if path.stem in missing])


def run_series(parameters: dict[str, object], notebooks: Sequence[Path] | None = None) -> Path:
    """Execute the notebooks in order into the folder of the run that `parameters` names, and return that folder.

    A notebook is skipped while its cells, its parameters, the helpers, the files of model and dataset, the other run's
    adapter, what it left in the run and the notebooks before it are those of its last complete execution. The
    parameters and the other run are checked here; without a `run` the run has the profile's name. Raises AlpacaError
    with the sentence of the cell that failed.
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
    sources = [*sorted(PACKAGE.rglob("*.py")), *used, pocket.HELDOUT, pocket.DOCUMENT / "adapter"]
    with run.lock(), check_disk_space(run.folder, needed=RUN_BYTES):
        _execute_changed(notebooks or NOTEBOOKS, chosen, run, _hash(commit, *map(content_hash, sources)))
    return run.folder


def _execute_changed(notebooks: Sequence[Path], parameters: dict[str, object], run: Run, inputs: str) -> None:
    """Execute the notebooks that are not done; `inputs` is the hash of all that the first one is made from."""
    done = run.manifest().get("notebooks")
    marks = done.items() if isinstance(done, dict) else ()
    done = {name: mark for name, mark in marks if isinstance(mark, dict) and "files" in mark}  # not an early version's
    for number, notebook in enumerate(notebooks, 1):
        known = notebook_parameters(notebook)
        chosen = {key: value for key, value in parameters.items() if key in known}
        inputs = _hash(inputs, *map(str, _code(notebook)), json.dumps(chosen, sort_keys=True))
        if notebook in FURTHER:
            inputs = _hash(inputs, run.artifact_hash("adapter"))
        if other := chosen.get("other_run"):
            inputs = _hash(inputs, Run.named(str(other), make=False).artifact_hash("adapter"))
        executed, mark = run.folder / notebook.name, done.get(notebook.stem, {})
        unchanged = mark.get("inputs") == inputs and len(_code(executed)) >= len(_code(notebook))
        unchanged = unchanged and all(_digest(run, name) == digest for name, digest in mark["files"].items())
        print(f"[{number}/{len(notebooks)}] {notebook.stem}{': unchanged' if unchanged else ''}", flush=True)
        if unchanged:
            continue
        after = {notebook.stem} if notebook in FURTHER else {name for name in done if name >= notebook.stem}
        done = {name: mark for name, mark in done.items() if name not in after}
        run.write_record("notebooks", done)  # until it is through, this notebook and those after it are not done
        before = _stamps(run.folder)
        _execute(notebook, executed, chosen)
        left = [name for name, stamp in _stamps(run.folder).items() if before.get(name) != stamp]
        for mark in done.values():  # a file is the notebook's that wrote it last
            mark["files"] = {name: digest for name, digest in mark["files"].items() if name not in left}
        left += [f"{RECORD}{part}" for part, by in PRODUCERS.items() if by == notebook.stem]
        done[notebook.stem] = {"inputs": inputs, "files": {name: _digest(run, name) for name in left}}
        run.write_record("notebooks", done)


def _execute(notebook: Path, executed: Path, parameters: dict[str, object]) -> None:
    """Execute one notebook and print what it took; raise AlpacaError with the sentence of the cell that failed."""
    import papermill  # only where notebooks are run: not everybody who opens one has it

    options = {"kernel_name": "python3", "extra_arguments": QUIET, "stdout_file": ProgressFile()}
    try:
        print(_times(papermill.execute_notebook(notebook, executed, parameters, **options)), flush=True)
    except (papermill.PapermillExecutionError, FileNotFoundError, RuntimeError) as error:
        if not executed.parent.exists():
            what = f"The run's folder {executed.parent} was deleted: start again."
            raise AlpacaError(what, "run-deleted") from error
        if type(error).__name__ == "DeadKernelError":  # nbclient's, which papermill brings along
            what = f"The kernel of {executed} was killed, most likely for want of memory: free some"
            remedy = "take a smaller `micro_batch_size` or model, and run this again"
            raise AlpacaError(f"{what}, or {remedy}.", "kernel-killed") from error
        if not isinstance(error, papermill.PapermillExecutionError):
            raise
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from error
        if error.ename == "OSError" and NO_SPACE in error.evalue:
            raise OSError(errno.ENOSPC, NO_SPACE) from error
        what = f"{error.ename}: {error.evalue} [cell {error.exec_count} of {executed}]"
        raise AlpacaError(what, "cell-failed") from error


def _code(notebook: Path) -> list[tuple[str, str]]:
    """Return type and source of each of a notebook's cells; none where it is missing, or cut."""
    try:
        return [(cell["cell_type"], cell["source"]) for cell in read_cells(notebook)]
    except AlpacaError:
        return []


def _stamps(folder: Path) -> dict[str, tuple]:
    """Return by name when each file of a run was written: not of notebooks and checkpoints, nor of the manifest."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if not name.startswith(("checkpoints/", ".lock", "manifest.json"))]
    stats = {name: (folder / name).stat() for name in kept if not name.endswith(".ipynb")}
    return {name: (stat.st_mtime_ns, stat.st_ino, stat.st_size) for name, stat in stats.items()}


def _digest(run: Run, name: str) -> str:
    """Return the hash of a file in the run's folder, or of a record in its manifest."""
    record = name.removeprefix(RECORD)
    return content_hash(run.folder / name) if record == name else _hash(json.dumps(run.manifest().get(record)))


def _times(executed) -> str:
    """Return what the notebook took, and its three longest cells: where its time went."""
    took = [(cell.metadata.papermill.duration or 0, cell.source) for cell in executed.cells if cell.source.strip()]
    longest = [f"{seconds:.0f} s {code.splitlines()[-1].strip():.40}" for seconds, code in sorted(took)[:-4:-1]]
    return f"    {executed.metadata.papermill.duration:.0f} s; the longest cells: {'; '.join(longest)}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # an older ipykernel warns at length of its debugger
    parser = argparse.ArgumentParser(prog="python -m alpaca_helpers.series", description=__doc__)
    parser.add_argument("--profile", default="auto", help="auto, pocket or gpt2-medium (auto)")
    parser.add_argument("--run", help="name of the run, or a path to its folder (the profile's name)")
    parser.add_argument("--further", action="store_true", help="the notebooks that go deeper, on a finished run")
    add_parameters(parser)
    options = parser.parse_args()
    if "" in (options.profile, options.run):
        parser.error("--profile and --run want a name")
    given = {"run": options.run} if options.run else {}
    given |= {} if options.profile == "auto" else {"profile": options.profile}
    folder = run_series(parse_parameters(options.p, **given), FURTHER if options.further else NOTEBOOKS)
    if not options.further:
        metrics = Run(folder).metrics()
        print(f"\n{comparison(metrics).to_string()}\n\n{conclusion(metrics)}\n")
    print(f"The executed notebooks are in {folder}.")


if __name__ == "__main__":
    run_command(main, "Interrupted: what is done is kept, and the same command goes on from there.")
