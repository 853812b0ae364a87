"""Instruction rows read from a file or the Hub and checked, before `load_dataset` gets them.

A row has the text columns `instruction`, `input` (may be empty) and `output`, and may have a `fact`: the words that
a right answer holds. Source: Alpaca's format (Taori et al., 2023).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from . import AlpacaError, locate
from .hub import cached_folder, fetch, first_line
from .runs import check_disk_space

COLUMNS = ("instruction", "input", "output", "fact")
NO_INPUT = {"noinput", "<noinput>", "no input", "n/a"}  # how Alpaca's generator wrote "this row has no input"

# A pinned dataset by its commit: its one file, columns and rows.
KNOWN = {
    "dce01c9b08f87459cf36a430d809084718273017": (
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
        ("instruction", "input", "output", "text"),
        52_002,
    )
}
DATA_FILES = ["*.parquet", "*.json", "*.jsonl", "*.jsonl.*", "*.csv", "*.arrow", "README.md"]
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 and so Arrow cannot


def prepare_rows(folder: Path, dataset: str, revision: str | None = None, heldout: str | None = None) -> dict[str, str]:
    """Return the files of checked rows, by split, that `load_dataset("parquet", data_files=…)` takes.

    Whatever form the rows come in, they are written to `folder` as Parquet with `COLUMNS`, all text.

    Args:
        dataset, revision: as in `load_rows`.
        heldout: a file with rows held out already, or None.

    Raises AlpacaError that names file and row.
    """
    sources = {"train": (dataset, revision)} | ({"heldout": (heldout, None)} if heldout else {})
    files = {}
    for split, source in sources.items():
        rows = load_rows(*source)
        with check_disk_space(folder, needed=rows.data.nbytes):
            folder.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(folder / f"{split}.parquet")
        files[split] = str(folder / f"{split}.parquet")
    return files


def load_rows(dataset: str, revision: str | None = None) -> Dataset:
    """Return the rows of a JSON, JSONL or Parquet file, or of a dataset's train split on the Hub.

    The columns are `COLUMNS`, all text; a missing `input` or `fact` is "". What ends in .json, .jsonl or .parquet, or
    is not of the form owner/name, is never looked up on the Hub.

    Raises AlpacaError that names file and row.
    """
    path = locate(dataset)
    if path.suffix in READERS:
        if not path.is_file():
            raise AlpacaError(f"There is no dataset file {dataset}: check the parameter `dataset`.", "dataset-missing")
        return Dataset.from_list(list(check_rows(READERS[path.suffix](path), dataset)))
    if path.exists() or dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        raise AlpacaError(
            f"The dataset {dataset} is neither a .json, .jsonl or .parquet file nor a name on the Hub (owner/name): "
            "check the parameter `dataset`.",
            "dataset-missing",
        )
    return Dataset.from_list(list(check_rows(_hub_rows(dataset, revision), dataset)))


def _hub_rows(name: str, revision: str | None) -> Dataset:
    """Return the train split of a dataset on the Hub, from the cache if it is known to hold all of it."""
    known_file, known_columns, known_rows = KNOWN.get(revision or "", ("", (), 0))
    folder = cached_folder(name, revision, "dataset", DATA_FILES)
    if folder is None or not known_file or not (folder / known_file).exists():
        try:
            folder = fetch(name, revision, "dataset", DATA_FILES)
        except AlpacaError as error:
            if folder is None or known_file:
                raise
            print(f"Using what the cache holds of {name}. {error}", flush=True)
    try:
        rows = load_dataset(str(folder), split="train")
    except (OSError, ValueError, DatasetsError) as error:
        raise AlpacaError(f"The dataset {name} in {folder} has no train split ({first_line(error)}).") from error
    if known_rows and (tuple(rows.column_names), len(rows)) != (known_columns, known_rows):
        raise AlpacaError(
            f"{name} in {folder} has {len(rows):,} rows of {', '.join(rows.column_names)}, where "
            f"{known_rows:,} of {', '.join(known_columns)} are known: delete that folder and run again."
        )
    return rows


@dataclass
class Twice:
    """Stands for a JSON object that holds a column twice: Python would keep only the last."""

    column: str


def _object(pairs: list[tuple[str, object]]) -> dict | Twice:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    return Twice(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))


def _read_json(path: Path) -> Iterable[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise AlpacaError(f"{path} is not UTF-8 text at byte {error.start}: save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise AlpacaError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}): mend that line.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise AlpacaError(
            f"{path} is no file of rows ({first_line(error)}): check that it is the right one."
        ) from error
    if not isinstance(rows, list):
        raise AlpacaError(f"{path} holds no JSON array of rows: write [{{…}}, …], or one row a line as .jsonl.")
    return rows


def _read_jsonl(path: Path) -> Iterator[dict]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise AlpacaError(f"{path}, line {number}: not valid JSON in UTF-8: mend that line.") from error


def _read_parquet(path: Path) -> Iterable[dict]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise AlpacaError(f"{path} cannot be read as Parquet ({error}): write it again.") from error


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def check_rows(rows: Iterable[dict], source: str) -> Iterator[dict]:
    """Yield each row with only `COLUMNS`; raise AlpacaError naming `source`, the row and what is wrong."""
    number = 0
    for number, row in enumerate(rows, 1):
        if isinstance(row, Twice):
            raise AlpacaError(f"{source}, row {number}: `{row.column}` is there twice: mend that row.")
        if not isinstance(row, dict):
            raise AlpacaError(f"{source}, row {number}: not an object with `instruction` and `output`: mend that row.")
        checked = {}
        for column in COLUMNS:
            value = row.get(column)
            if value is None and column in ("input", "fact"):
                value = ""
            if column not in row and column in ("instruction", "output"):
                raise AlpacaError(
                    f"{source}, row {number}: no column `{column}` (it has {', '.join(row) or 'none'}): "
                    "rename the columns to instruction, input, output."
                )
            if not isinstance(value, str):
                raise AlpacaError(f"{source}, row {number}: `{column}` is {value!r:.40}, not text: mend that row.")
            if half := HALF_CHARACTER.search(value):
                raise AlpacaError(
                    f"{source}, row {number}: `{column}` holds half a character ({half[0]!a}, a surrogate without its "
                    "pair): mend that row."
                )
            checked[column] = value
        if checked["input"].strip().lower() in NO_INPUT:
            checked["input"] = ""
        yield checked
    if not number:
        raise AlpacaError(f"{source} has no rows: check that the file is whole.")
