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

from . import AlpacaError, project_folder
from .files import CHECKSUMS, content_hash, read_json, verify_checksums, write_json

PRODUCERS = {  # the notebook that makes each artifact
    "data": "02_dataset_and_tokenizer",
    "adapter": "03_lora_finetuning",
    "metrics.json": "04_comparison_and_chat",
}
LOCKED = "ALPACA_LOCKED_RUN"  # environment variable: the run whose lock a process holds, for those that it starts
PARTS = {"data", "training", "adapter", "notebooks"}  # of a manifest
TYPES: dict[str, Any] = {  # of what is read from a manifest's record
    **dict.fromkeys(("name", "model", "dataset", "recipe", "fingerprint", "sha256"), str),
    **dict.fromkeys(("max_length", "seed", "lora_rank"), int),
    **dict.fromkeys(("learning_rate", "num_train_epochs"), (int, float)),
}


def run_folder(run: str, make: bool = True) -> Path:
    """Return the run's folder: `runs/<run>`, or the path that `run` is (it holds a / or is . or ..).

    With `make` a new one is made, with its `pictures` and an empty manifest. Raises AlpacaError if that cannot be, or
    for a folder with files that no run has made.
    """
    is_path = {"/", os.sep} & set(run) or run in (".", "..", "~")
    folder = Path(run).expanduser().resolve() if is_path else project_folder() / "runs" / run
    if make:
        try:
            if strange := folder.is_dir() and _strange_file(folder):
                what = f"The folder {folder} is no run's, it holds {strange}: take another `run`."
                raise AlpacaError(what, "not-a-run")
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"The folder {folder} cannot be made ({error.strerror}): take another `run`."
            raise AlpacaError(what, "run-unwritable") from error
        if not (folder / "manifest.json").exists():
            write_json(folder / "manifest.json", {})
    return folder


def _strange_file(folder: Path) -> str:
    """Return the name of a file that no run has made, where the folder is not known for a run's by its manifest."""
    if (folder / "manifest.json").exists():
        return "" if set(read_manifest(folder)) <= PARTS else "a manifest.json of something else"
    others = (path for path in sorted(folder.iterdir()) if path.name not in ("pictures", ".lock"))
    return next((path.name for path in others if not _is_executed(path)), "")


def _is_executed(path: Path) -> bool:
    """Return whether a file is a notebook that papermill has written."""
    try:
        return path.suffix == ".ipynb" and "papermill" in json.loads(path.read_bytes())["metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
    if os.environ.get(LOCKED) == str(folder.resolve()):
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
        what = f"The run {folder} cannot be written to ({error.strerror}): take another `run`."
        raise AlpacaError(what, "run-unwritable") from error
    os.environ[LOCKED] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ[LOCKED]
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
    needed = TYPES.keys() - (set() if part == "adapter" else {"sha256", "lora_rank"})
    if wrong := sorted(name for name in needed if not isinstance(record.get(name), TYPES[name])):
        what = f"The manifest of {folder} is of another version ({part}: {wrong[0]}): run notebook {notebook} again."
        raise AlpacaError(what, "manifest-version")
    again = f"run notebook {notebook} with `resume = False`, or take another `run`"
    if isinstance(data, dict) and record["fingerprint"] != data.get("fingerprint"):
        what = f"The adapter in {folder} was trained on other rows than the run's data, which notebook 02 has made anew"
        raise AlpacaError(f"{what}: {again}.", "other-rows")
    if part == "adapter" and record["sha256"] != content_hash(artifact(folder, part), "*.safetensors"):
        what = f"The adapter in {folder} is not the one that the manifest tells of"
        raise AlpacaError(f"{what}: {again}.", "other-adapter")
    return record


def write_record(folder: Path, part: str, content: dict) -> None:
    """Write into the run's manifest what made `part`."""
    write_json(folder / "manifest.json", read_manifest(folder) | {part: content})
