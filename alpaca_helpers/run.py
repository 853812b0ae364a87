"""A run: its folder, the lock on it, its artifacts, and the manifest's records of what made them.

    runs/<run>/  data/  checkpoints/  adapter/  metrics.json  manifest.json  pictures/  and the executed notebooks

Notebooks hand over to one another only by these files.
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

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


class DataRecord(BaseModel):
    """What the manifest must say of the settings that made a run's data; it says more."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    name: str  # of the profile
    model: str
    model_revision: str | None = None  # which version 0.1 did not record
    dataset: str
    recipe: str
    fingerprint: str  # of the rows
    max_length: int
    seed: int
    learning_rate: int | float
    num_train_epochs: int | float


class AdapterRecord(DataRecord):
    """What the manifest must say of the training that made a run's adapter."""

    sha256: str  # of the weights
    lora_rank: int


class Run:
    """A run in a folder, there or not."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def named(cls, name: str, make: bool = True) -> "Run":
        """Return the run of this name, in `runs/<name>`, or in the path that it is (it holds a / or is . or ..).

        With `make` it may be written to: a new or empty folder is made and marked as a run's. Raises AlpacaError if
        that cannot be, for a folder of the package, and for one with files that is not marked.
        """
        is_path = {"/", os.sep} & set(name) or name in (".", "..", "~")
        run = cls(Path(name).expanduser().resolve() if is_path else project_folder() / "runs" / name)
        if make:
            run.make()
        return run

    def make(self) -> None:
        """Make the folder and mark it as a run's."""
        try:
            self._refuse_foreign()
            with check_disk_space(self.folder, needed=RUN_BYTES):
                (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
                if not (self.folder / MARK).exists():
                    (self.folder / MARK).write_text("A run of alpaca_helpers: what it recorded here, it may replace.\n")
        except OSError as error:
            what = f"The folder {self.folder} cannot be made ({error.strerror}): take another `run`."
            raise AlpacaError(what, "run-unwritable") from error

    def _refuse_foreign(self) -> None:
        here = (self.folder, *self.folder.parents)
        if any(parent.name == PACKAGE.name and (parent / "__init__.py").is_file() for parent in here):
            what = f"The folder {self.folder} is part of the package {PACKAGE.name}: take another `run`."
            raise AlpacaError(what, "not-a-run")
        files = sorted(self.folder.iterdir()) if self.folder.is_dir() and not self._is_marked() else []
        if foreign := [path.name for path in files if not _is_executed(path)]:
            what = f"The folder {self.folder} is not a run's, it holds {foreign[0]}"
            raise AlpacaError(f"{what}: take another `run`, or move its files away.", "not-a-run")

    def _is_marked(self) -> bool:
        """Return whether the folder is marked as a run's or, made by version 0.2, has the whole record of its data."""
        if (self.folder / MARK).is_file():
            return True
        try:
            manifest = json.loads((self.folder / "manifest.json").read_bytes())
            DataRecord(**manifest["data"])
            return set(manifest) <= {"data", "training", "adapter", "notebooks"}
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's lock in the block, for this process and those that it starts in the block.

        The system releases it when the process ends, even killed. Raises AlpacaError if another process holds it.
        """
        held = os.environ.get(LOCKED, "")
        if str(self.folder.resolve()) in held.split("\n"):
            yield
            return
        path = self.folder / ".lock"
        lock = FileLock(path)  # the operating system's own lock
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            other, remedy = "", "wait for it to end, or take another `run`"
            with suppress(OSError, IndexError):  # a mark that outlives its process, where a disk knows no locks
                other = path.read_text().splitlines()[1]
            if other not in ("", platform.node()):
                remedy += f" (if that machine is gone, delete {path})"
            process = "Another process" + f" on {other}" * bool(other)
            raise AlpacaError(f"{process} is writing to the run {self.folder}: {remedy}.", "run-locked") from error
        except OSError as error:
            what = f"The run {self.folder} cannot be written to ({error.strerror}): make room, or take another `run`."
            raise AlpacaError(what, "run-unwritable") from error
        os.environ[LOCKED] = f"{held}\n{self.folder.resolve()}"
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
            raise AlpacaError(what, "no-artifact")
        return path

    def artifact_hash(self, name: str) -> str:
        """Return the SHA-256 of an artifact as it was saved; "" where it is missing, or not whole any more."""
        path = self.folder / name
        if path.is_dir():
            return "" if verify_checksums(path) else content_hash(path / CHECKSUMS)
        return content_hash(path)

    def manifest(self) -> dict:
        """Return what made the artifacts, by part (`data`, `training`, …); empty for a new run."""
        path = self.folder / "manifest.json"
        return read_json(path, "delete it and run notebook 02 again") if path.exists() else {}

    def record(self, part: str) -> dict:
        """Return the manifest's record of what made the run's `data` or its `adapter`.

        Raises AlpacaError where there is none, or one of another version; for an adapter made from other rows than the
        run's data; and for one that is not the adapter that the record is of.
        """
        manifest, notebook = self.manifest(), PRODUCERS[part]
        record, data = manifest.get(part), manifest.get("data")
        if not isinstance(record, dict):
            what = f"The manifest of {self.folder} has no {part}: run notebook {notebook}, with the same `run`."
            raise AlpacaError(what, "no-artifact")
        try:
            record = (AdapterRecord if part == "adapter" else DataRecord)(**record).model_dump()
        except ValidationError as error:
            what = f"The manifest of {self.folder} is of another version ({part}: {error.errors()[0]['loc'][0]})"
            raise AlpacaError(f"{what}: run notebook {notebook} again.", "manifest-version") from error
        again = f"run notebook {notebook} with `resume = False`, or take another `run`"
        if isinstance(data, dict) and record["fingerprint"] != data.get("fingerprint"):
            what = f"The adapter in {self.folder} was trained on other rows than those that notebook 02 has made since"
            raise AlpacaError(f"{what}: {again}.", "other-rows")
        if part == "adapter" and record["sha256"] != content_hash(self.artifact(part), "*.safetensors"):
            what = f"The adapter in {self.folder} is not the one that the manifest records"
            raise AlpacaError(f"{what}: {again}.", "other-adapter")
        return record

    def write_record(self, part: str, content: dict) -> None:
        """Write into the manifest what made `part`."""
        write_json(self.folder / "manifest.json", self.manifest() | {part: content})

    def metrics(self) -> dict:
        """Return the run's metrics.json; raise AlpacaError where it is missing, broken or of another version."""
        path = self.artifact("metrics.json")
        metrics = read_json(path, remedy := f"run notebook {PRODUCERS['metrics.json']} again")
        if any(not isinstance(metrics.get(side), dict) for side in ("base", "tuned", "change", "base_bare")):
            raise AlpacaError(f"{path} is of another version: {remedy}.", "manifest-version")
        return metrics


def _is_executed(path: Path) -> bool:
    """Return whether papermill wrote a notebook with these helpers to `path`, as it does before a cell runs."""
    try:
        content = path.read_bytes() if path.suffix == ".ipynb" else b""
        return PACKAGE.name.encode() in content and "papermill" in json.loads(content)["metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
