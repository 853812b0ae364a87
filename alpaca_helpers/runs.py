"""A run's folder: its artifacts, their checksums, the manifest of what made them, and its lock.

    runs/<run>/  data/  checkpoints/  adapter/  metrics.json  manifest.json  and the four executed notebooks

Notebooks hand over to one another only by these files.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from . import AlpacaError, project_folder

PRODUCERS = {  # the notebook that makes each artifact
    "data": "02_dataset_and_tokenizer",
    "adapter": "03_lora_finetuning",
    "metrics.json": "04_comparison_and_chat",
}
CHECKSUMS = "checksums.json"  # in a checkpoint and an adapter: the SHA-256 of each file, written last


def run_folder(run: str, make: bool = True) -> Path:
    """Return the run's folder: `runs/<run>`, or the path that `run` is; made with its `pictures` if `make`."""
    path = Path(run).expanduser()
    folder = path.resolve() if len(path.parts) > 1 else project_folder() / "runs" / run
    if make:
        try:
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AlpacaError(
                f"The folder {folder} cannot be made ({error.strerror}): take another `run`.", "run-unwritable"
            ) from error
    return folder


def artifact(folder: Path, name: str) -> Path:
    """Return the path of a run's artifact; raise AlpacaError that says which notebook makes it if it is not there."""
    path = folder / name
    if not path.exists():
        raise AlpacaError(
            f"The run {folder} has no {name}: run notebook {PRODUCERS[name]} first, with the same `run`.", "no-artifact"
        )
    return path


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold the run's lock in the block; the system releases it when the process ends, even killed.

    Raises AlpacaError that names the run if another process holds it.
    """
    lock = FileLock(folder / ".lock")  # the operating system's own lock
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise AlpacaError(
            f"Another process is training in the run {folder}: wait for it to end, or take another `run`.", "run-locked"
        ) from error
    except OSError as error:
        raise AlpacaError(
            f"The run {folder} cannot be written to ({error.strerror}): take another `run`.", "run-unwritable"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which takes the place of `folder` when the block ends without an error."""
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # cut between the two renames below
        old.rename(folder)
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise AlpacaError(
            f"{folder} cannot be written ({error.strerror}): take another `run`.", "run-unwritable"
        ) from error
    try:
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        if not folder.exists() and old.exists():
            old.rename(folder)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def check_disk_space(folder: Path, needed: int) -> Iterator[None]:
    """Write to `folder` inside the block, where about `needed` bytes are to be free.

    Raises AlpacaError that says how much room is needed, if there is less or the disk fills up.
    """
    disk = next(parent for parent in (folder, *folder.parents) if parent.exists())

    def disk_full() -> AlpacaError:
        free = shutil.disk_usage(disk).free
        return AlpacaError(
            f"The disk under {folder} is full: {needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free; "
            "make room and run this again.",
            "disk-full",
        )

    if shutil.disk_usage(disk).free < needed:
        raise disk_full()
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's error
        no_space = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(
            error
        )
        if no_space or shutil.disk_usage(disk).free < needed / 4:
            raise disk_full() from error
        raise


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of each file of the folder into it, last: without them the folder is incomplete."""
    files = [path for path in sorted(folder.iterdir()) if path.name != CHECKSUMS]
    write_json(folder / CHECKSUMS, {path.name: _sha256(path) for path in files})


def verify_checksums(folder: Path) -> str:
    """Return what is wrong with a folder ("" if nothing): incomplete, or changed since its checksums were written."""
    try:
        saved = dict(json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return "its writing was cut"
    for name, digest in saved.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} is damaged"
    return ""


def content_hash(path: Path, pattern: str = "*") -> str:
    """Return the SHA-256 of a file, or of the files in a folder that match `pattern`; "" where there is neither."""
    if path.is_dir():
        files = sorted(file for file in path.rglob(pattern) if file.is_file())
        listed = "".join(f"{file.relative_to(path)} {_sha256(file)}\n" for file in files)
        return hashlib.sha256(listed.encode()).hexdigest()
    return _sha256(path) if path.is_file() else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: where that fails, the earlier one stays and OSError is raised."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a run's file atomically; raise AlpacaError where it cannot be written."""
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise AlpacaError(
            f"{path} cannot be written ({error.strerror}): make room, or take another `run`.", "run-unwritable"
        ) from error


def write_json(path: Path, content: dict) -> None:
    """Write a run's JSON file atomically; errors as in `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> dict:
    """Return what made the run's artifacts, by part (`data`, `training`, …); empty for a new run."""
    path = folder / "manifest.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise AlpacaError(
            f"{path} is broken ({error}): delete it and run notebook 02 again.", "manifest-broken"
        ) from error


def read_record(folder: Path, part: str) -> dict:
    """Return the manifest's record of what made the run's `data`, or by its `training` the adapter.

    Raises AlpacaError where there is none, and for an adapter trained on other rows than the run's data.
    """
    manifest = read_manifest(folder)
    notebook = PRODUCERS["adapter" if part == "training" else part]
    if part not in manifest:
        raise AlpacaError(
            f"The manifest of {folder} has no {part}: run notebook {notebook}, with the same `run`.", "no-artifact"
        )
    if manifest[part]["fingerprint"] != manifest.get("data", manifest[part])["fingerprint"]:
        raise AlpacaError(
            f"The adapter in {folder} was trained on other rows than the run's data, which notebook 02 has made anew: "
            f"run notebook {notebook} with `resume = False`, or take another `run`.",
            "other-rows",
        )
    return manifest[part]


def write_record(folder: Path, part: str, content: dict) -> None:
    """Write into the run's manifest what made `part`."""
    write_json(folder / "manifest.json", read_manifest(folder) | {part: content})
