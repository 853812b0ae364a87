"""A run's folder: where artifacts are, whether each is whole, what made it.

    runs/<run>/  data/  checkpoints/  adapter/  metrics.json  manifest.json  and the four executed notebooks

Notebooks hand over to one another by these files alone.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import PROJECT, AlpacaError

MADE_BY = {
    "data": "02_dataset_and_tokenizer",
    "adapter": "03_lora_finetuning",
    "metrics.json": "04_comparison_and_chat",
}


def run_folder(run: str) -> Path:
    """Return the run's folder, made if needed: `runs/<run>` of the project, or the path that `run` is."""
    path = Path(run).expanduser()
    folder = path.resolve() if len(path.parts) > 1 else PROJECT / "runs" / run
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def artifact(folder: Path, name: str) -> Path:
    """Return the path of a run's artifact; raise AlpacaError that says which notebook makes it if it is not there."""
    path = folder / name
    if not path.exists():
        raise AlpacaError(f"The run {folder} has no {name}: run notebook {MADE_BY[name]} first, with the same `run`.")
    return path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which takes the place of `folder` when the block ends without an error."""
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
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


def write_json(path: Path, content: dict) -> None:
    """Write JSON whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_manifest(folder: Path) -> dict:
    """Return what made the run's artifacts, by part (`data`, `training`, …); empty for a new run."""
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(folder: Path, part: str, content: dict) -> None:
    """Write into the run's manifest what made `part`."""
    write_json(folder / "manifest.json", read_manifest(folder) | {part: content})
