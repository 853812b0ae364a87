"""A run: its folder, the lock on it, its artifacts, and the manifest's records of what made them.

    runs/<run>/  data/  checkpoints/  adapter/  metrics.json  manifest.json  pictures/  and the executed notebooks

Notebooks hand over to one another only by these files.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from . import PACKAGE, AlpacaError, project_folder
from .data import RECIPES
from .files import CHECKSUMS, LEFT_BEHIND, check_disk_space, content_hash, read_json, verify_checksums, write_json

PRODUCERS = {  # the notebook that makes each artifact
    "data": "02_dataset_and_tokenizer",
    "adapter": "03_lora_finetuning",
    "metrics.json": "04_comparison_and_chat",
}
LOCKED = "ALPACA_LOCKED_RUN"  # environment variable: the runs that a process holds, a line each, for those it starts
MARK = ".alpaca-run"  # the file that makes a folder a run's
RUN_BYTES = 2_000_000  # room that a run takes on disk at least


class Record(BaseModel):
    """What the manifest must say of what made a run's data, or its adapter; it says more."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    name: str  # of the profile
    model: str
    model_revision: str | None = None  # which version 0.1 did not record
    dataset: str
    recipe: Literal[tuple(RECIPES)]  # type: ignore[valid-type]
    fingerprint: str  # of the rows
    max_length: int
    seed: int
    learning_rate: int | float
    num_train_epochs: int | float
    sha256: str = ""  # of the adapter's weights


@dataclass
class Run:
    """A run in a folder, there or not."""

    folder: Path

    @classmethod
    def named(cls, name: str, make: bool = True) -> "Run":
        """Return the run of this name, in `runs/<name>`, or in the path that it is (it holds a / or is . or ..).

        With `make` it may be written to: a new or empty folder is made and marked as a run's. Raises AlpacaError if
        that cannot be, and for a folder with files that is not marked.
        """
        is_path = {"/", os.sep} & set(name) or name in (".", "..", "~")
        folder = Path(os.path.realpath(os.path.expanduser(name))) if is_path else project_folder() / "runs" / name
        if make and not (folder / MARK).is_file():
            if any(part.name == PACKAGE.name and (part / "__init__.py").is_file() for part in folder.parents):
                raise AlpacaError(f"The folder {folder} lies in {PACKAGE.name}: take another `run`.")
            files = sorted(folder.iterdir()) if folder.is_dir() else []
            for file in files:
                if not any(map(file.match, LEFT_BEHIND)) and not _is_executed(file):
                    what = f"The folder {folder} is not marked as a run's ({MARK}) and holds {file.name}"
                    raise AlpacaError(f"{what}: take another `run`, or move its files away.")
            with check_disk_space(folder, needed=RUN_BYTES):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / MARK).write_text("A run of alpaca_helpers: what it recorded here, it may replace.\n")
                (folder / "pictures").mkdir(exist_ok=True)
        return cls(folder)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's lock in the block, for this process and those that it starts in the block.

        The system releases it when the process ends, even killed. AlpacaError if another process holds it.
        """
        held, folder, path = os.environ.get(LOCKED, ""), str(self.folder.resolve()), self.folder / ".lock"
        if folder in held.split("\n"):
            yield
            return
        lock = FileLock(path)  # the operating system's own lock
        try:
            with check_disk_space(path):
                lock.acquire(timeout=0)
        except Timeout as error:
            what = f"Another process is writing to the run {self.folder}: wait for it to end, or take another `run`"
            gone = f"(on a disk without locks, delete {path} if no process is left)"
            raise AlpacaError(f"{what} {gone}.") from error
        os.environ[LOCKED] = f"{held}\n{folder}"
        try:
            yield
        finally:
            os.environ[LOCKED] = held
            lock.release()

    def artifact(self, name: str) -> Path:
        """Return the path of an artifact; raise AlpacaError that says which notebook makes it if it is not whole."""
        path = self.folder / name
        fault = verify_checksums(path) if path.is_dir() else ""
        if fault or not path.exists():
            lacks = f"whole {name} ({fault})" if fault else name
            what = f"The run {self.folder} has no {lacks}: run notebook {PRODUCERS[name]} first, with the same `run`."
            raise AlpacaError(what)
        return path

    def artifact_hash(self, name: str) -> str:
        """Return the SHA-256 of an artifact as it was saved; "" where it is missing, or not whole any more."""
        path = self.folder / name
        if path.is_dir():
            return "" if verify_checksums(path) else content_hash(path / CHECKSUMS)
        return content_hash(path)

    def manifest(self) -> dict:
        """Return what made the artifacts, by part (`data`, `training`, …); empty for a new run.

        A part that is no record, such as null, is as if it were not there.
        """
        path = self.folder / "manifest.json"
        parts = read_json(path, "delete it and run notebook 02 again") if path.exists() else {}
        return {part: made for part, made in parts.items() if isinstance(made, dict)}

    def record(self, part: str) -> dict:
        """Return the manifest's record of what made the run's `data` or its `adapter`.

        Raises AlpacaError where there is none, or one of another version; for an adapter made from other rows than the
        run's data; and for one that is not the adapter that the record is of.
        """
        manifest, notebook = self.manifest(), PRODUCERS[part]
        try:
            record = Record.model_validate(manifest.get(part)).model_dump()
        except ValidationError as error:
            lacks = ".".join([part, *map(str, error.errors()[0]["loc"][:1])])
            what = f"The manifest of {self.folder} has no `{lacks}`, or one of another version"
            raise AlpacaError(f"{what}: run notebook {notebook}, with the same `run`.") from error
        other, data = "", manifest.get("data", record)
        if record["fingerprint"] != data.get("fingerprint"):
            other = "was trained on other rows than the run now has"
        elif part == "adapter" and record["sha256"] != content_hash(self.artifact(part), "*.safetensors"):
            other = "is not the one that the manifest records"
        if other:
            remedy = f"run notebook {notebook} with `resume = False`, or take another `run`"
            raise AlpacaError(f"The adapter in {self.folder} {other}: {remedy}.")
        return record

    def write_record(self, part: str, content: dict) -> None:
        """Write into the manifest what made `part`."""
        write_json(self.folder / "manifest.json", self.manifest() | {part: content})

    def metrics(self) -> dict:
        """Return the run's metrics.json; raise AlpacaError where it is missing, broken or of another version."""
        path = self.artifact("metrics.json")
        metrics = read_json(path, remedy := f"run notebook {PRODUCERS['metrics.json']} again")
        if any(not isinstance(metrics.get(side), dict) for side in ("base", "tuned", "change", "base_bare")):
            raise AlpacaError(f"{path} is of another version: {remedy}.")
        return metrics


def _is_executed(path: Path) -> bool:
    """Return whether papermill wrote a notebook with these helpers to `path`, as it does before a cell runs."""
    try:
        content = path.read_bytes() if path.suffix == ".ipynb" else b""
        return PACKAGE.name.encode() in content and "papermill" in json.loads(content)["metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
