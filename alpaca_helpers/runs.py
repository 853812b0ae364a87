"""A run's folder: its artifacts, the manifest of what made them, and its lock.

    runs/<run>/  data/  checkpoints/  adapter/  metrics.json  manifest.json  and the four executed notebooks

Notebooks hand over to one another only by these files.
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import PACKAGE, AlpacaError, project_folder
from .files import CHECKSUMS, check_disk_space, content_hash, read_json, verify_checksums, write_json

PRODUCERS = {  # the notebook that makes each artifact
    "data": "02_dataset_and_tokenizer",
    "adapter": "03_lora_finetuning",
    "metrics.json": "04_comparison_and_chat",
}
LOCKED = "ALPACA_LOCKED_RUN"  # environment variable: the runs that a process holds, a line each, for those it starts
MARK = ".alpaca-run"  # the file that makes a folder a run's
RUN_BYTES = 2_000_000  # room that a run takes on disk at least
PARTS = {"data", "training", "adapter", "notebooks"}  # of a manifest
TYPES: dict[str, Any] = {  # of what is read from a manifest's record
    **dict.fromkeys(("name", "model", "dataset", "recipe", "fingerprint", "sha256"), str),
    **dict.fromkeys(("max_length", "seed", "lora_rank"), int),
    **dict.fromkeys(("learning_rate", "num_train_epochs"), (int, float)),
}


def run_folder(run: str, make: bool = True) -> Path:
    """Return the run's folder: `runs/<run>`, or the path that `run` is (it holds a / or is . or ..).

    With `make` it may be written to: a new or empty one is made and marked as a run's. Raises AlpacaError if that
    cannot be, also for want of room, for a folder of the package, and for one with files that is not marked.
    """
    is_path = {"/", os.sep} & set(run) or run in (".", "..", "~")
    folder = Path(run).expanduser().resolve() if is_path else project_folder() / "runs" / run
    if make:
        try:
            _refuse_foreign(folder)
            with check_disk_space(folder, needed=RUN_BYTES):
                folder.mkdir(parents=True, exist_ok=True)
                if not (folder / MARK).exists():
                    (folder / MARK).write_text("A run of alpaca_helpers: what it recorded here, it may replace.\n")
                (folder / "pictures").mkdir(exist_ok=True)
        except OSError as error:
            what = f"The folder {folder} cannot be made ({error.strerror}): take another `run`."
            raise AlpacaError(what, "run-unwritable") from error
    return folder


def _refuse_foreign(folder: Path) -> None:
    """Raise AlpacaError for a folder that lies in the package, or has files and is not marked as a run's."""
    here = (folder, *folder.parents)
    if any(parent.name == PACKAGE.name and (parent / "__init__.py").is_file() for parent in here):
        what = f"The folder {folder} is part of the package {PACKAGE.name}: take another `run`."
        raise AlpacaError(what, "not-a-run")
    files = sorted(folder.iterdir()) if folder.is_dir() and not _is_marked(folder) else []
    if strange := [path.name for path in files if not _is_executed(path)]:
        what = f"The folder {folder} is no run's, it holds {strange[0]}: take another `run`, or move its files away."
        raise AlpacaError(what, "not-a-run")


def _is_executed(path: Path) -> bool:
    """Return whether papermill wrote a notebook with these helpers to `path`, as it does before a cell runs."""
    try:
        content = path.read_bytes() if path.suffix == ".ipynb" else b""
        return PACKAGE.name.encode() in content and "papermill" in json.loads(content)["metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_marked(folder: Path) -> bool:
    """Return whether a folder is marked as a run's or, made by version 0.2, has the whole record of its data."""
    if (folder / MARK).is_file():
        return True
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return set(manifest) <= PARTS and not _misfits(manifest["data"], "data")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _misfits(record: dict, part: str) -> list[str]:
    """Return what the record of a part lacks, or has as another type."""
    needed = TYPES.keys() - (set() if part == "adapter" else {"sha256", "lora_rank"})
    return sorted(name for name in needed if not isinstance(record.get(name), TYPES[name]))


def artifact(folder: Path, name: str) -> Path:
    """Return the path of a run's artifact; raise AlpacaError that says which notebook makes it if it is not whole."""
    path = folder / name
    fault = verify_checksums(path) if path.is_dir() else ""
    if fault or not path.exists():
        lacks = f"whole {name} ({fault})" if fault else name
        what = f"The run {folder} has no {lacks}: run notebook {PRODUCERS[name]} first, with the same `run`."
        raise AlpacaError(what, "no-artifact")
    return path


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold the run's lock in the block, for this process and those that it starts in the block.

    The system releases it when the process ends, even killed. Raises AlpacaError if another process holds it.
    """
    held = os.environ.get(LOCKED, "")
    if str(folder.resolve()) in held.split("\n"):
        yield
        return
    lock = FileLock(folder / ".lock")  # the operating system's own lock
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        other, remedy = "", "wait for it to end, or take another `run`"
        with suppress(OSError, IndexError):  # a mark that outlives its process, where a disk knows no locks
            other = (folder / ".lock").read_text().splitlines()[1]
        if other not in ("", platform.node()):
            remedy += f" (if that machine is gone, delete {folder / '.lock'})"
        process = "Another process" + f" on {other}" * bool(other)
        raise AlpacaError(f"{process} is writing to the run {folder}: {remedy}.", "run-locked") from error
    except OSError as error:
        what = f"The run {folder} cannot be written to ({error.strerror}): make room, or take another `run`."
        raise AlpacaError(what, "run-unwritable") from error
    os.environ[LOCKED] = f"{held}\n{folder.resolve()}"
    try:
        yield
    finally:
        os.environ[LOCKED] = held
        lock.release()


def artifact_hash(path: Path) -> str:
    """Return the SHA-256 of a run's artifact as it was saved; "" where it is missing, or not whole any more."""
    if path.is_dir():
        return "" if verify_checksums(path) else content_hash(path / CHECKSUMS)
    return content_hash(path)


def read_manifest(folder: Path) -> dict:
    """Return what made the run's artifacts, by part (`data`, `training`, …); empty for a new run."""
    path = folder / "manifest.json"
    return read_json(path, "delete it and run notebook 02 again") if path.exists() else {}


def read_metrics(folder: Path) -> dict:
    """Return the run's metrics.json; raise AlpacaError where it is missing, broken or of another version."""
    path = artifact(folder, "metrics.json")
    metrics = read_json(path, remedy := f"run notebook {PRODUCERS['metrics.json']} again")
    if any(not isinstance(metrics.get(side), dict) for side in ("base", "tuned", "change", "base_bare")):
        raise AlpacaError(f"{path} is of another version: {remedy}.", "manifest-version")
    return metrics


def read_record(folder: Path, part: str) -> dict:
    """Return the manifest's record of what made the run's `data` or its `adapter`.

    Raises AlpacaError where there is none, or one of another version; for an adapter made from other rows than the
    run's data; and for one that is not the adapter that the record is of.
    """
    manifest, notebook = read_manifest(folder), PRODUCERS[part]
    record, data = manifest.get(part), manifest.get("data")
    if not isinstance(record, dict):
        what = f"The manifest of {folder} has no {part}: run notebook {notebook}, with the same `run`."
        raise AlpacaError(what, "no-artifact")
    if wrong := _misfits(record, part):
        what = f"The manifest of {folder} is of another version ({part}: {wrong[0]}): run notebook {notebook} again."
        raise AlpacaError(what, "manifest-version")
    again = f"run notebook {notebook} with `resume = False`, or take another `run`"
    if isinstance(data, dict) and record["fingerprint"] != data.get("fingerprint"):
        what = f"The adapter in {folder} was trained on other rows than the run's data, which notebook 02 has made anew"
        raise AlpacaError(f"{what}: {again}.", "other-rows")
    if part == "adapter" and record["sha256"] != content_hash(artifact(folder, part), "*.safetensors"):
        what = f"The adapter in {folder} is not the one that the manifest tells of"
        raise AlpacaError(f"{what}: {again}.", "other-adapter")
    return {"model_revision": None} | record  # of which an early version's manifest tells nothing


def write_record(folder: Path, part: str, content: dict) -> None:
    """Write into the run's manifest what made `part`."""
    write_json(folder / "manifest.json", read_manifest(folder) | {part: content})
