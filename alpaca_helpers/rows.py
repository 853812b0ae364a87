"""Instruction rows read from a file or the Hub and checked, before `load_dataset` gets them.

A row has the text columns `instruction`, `input` (may be empty) and `output`, and may have a `fact`: the words that
a right answer holds. Source: Alpaca's format (Taori et al., 2023).
"""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mode

import pandas as pd
import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from . import AlpacaError, locate
from .files import check_disk_space
from .hub import cached_folder, fetch, first_line
from .runs import lock_run

COLUMNS = ("instruction", "input", "output", "fact")
NO_INPUT = re.compile(r"[\W_]*(no[\W_]*input|n/a)[\W_]*", re.IGNORECASE)  # as Alpaca's generator wrote it
OTHER_NAMES = {"context": "input"}  # what others call our columns
OTHER_NAMES |= dict.fromkeys(("question", "prompt", "query"), "instruction")
OTHER_NAMES |= dict.fromkeys(("response", "answer", "completion"), "output")
REPEATED = "text"  # in Alpaca's files: the other columns in one
CONVERSATIONS = {"messages", "conversations", "conversation"}
KNOWN = {  # a pinned dataset by its commit: its one file, columns and rows
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

    Whatever form the rows come in, they are written as Parquet to `rows` in the run's `folder`, under its lock.
    Arguments and errors as in `load_rows`; `heldout` is a file with rows held out already.
    """
    sources = {"train": (dataset, revision)} | ({"heldout": (heldout, None)} if heldout else {})
    files = {}
    with lock_run(folder):
        for split, source in sources.items():
            rows, path = load_rows(*source), folder / "rows" / f"{split}.parquet"
            with check_disk_space(folder, needed=rows.data.nbytes):
                path.parent.mkdir(parents=True, exist_ok=True)
                rows.to_parquet(path)
            files[split] = str(path)
    return files


def load_rows(dataset: str, revision: str | None = None) -> Dataset:
    """Return the rows of a file or a folder of Parquet files, or of a dataset's train split on the Hub.

    The columns are `COLUMNS`, all text; a missing `input` or `fact` is "". What is here is never looked up on the Hub,
    nor what ends like a file (`READERS`, also with .gz) or is not of the form owner/name. Errors name file and row.
    """
    path = locate(dataset)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind in READERS and not path.is_file():
        raise AlpacaError(f"There is no dataset file {dataset}: check the parameter `dataset`.", "dataset-missing")
    if path.is_dir() and (shards := sorted(path.glob("*.parquet"))):
        rows: Iterable[dict] = (row for shard in shards for row in _read_parquet(shard))
    elif kind in READERS:
        rows = READERS[kind](path)
    elif path.exists() or dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        forms = f"a file (.{', .'.join(READERS)}, also .gz), a folder of .parquet files"
        what = f"The dataset {dataset} is neither {forms} nor a name on the Hub (owner/name)"
        raise AlpacaError(f"{what}: check the parameter `dataset`.", "dataset-missing")
    else:
        rows = _hub_rows(dataset, revision)
    return Dataset.from_list(list(check_rows(rows, dataset)))


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
        what = f"{name} in {folder} has {len(rows):,} rows of {', '.join(rows.column_names)}"
        known = f"{known_rows:,} of {', '.join(known_columns)} are known"
        raise AlpacaError(f"{what}, where {known}: delete that folder and run again.")
    return rows


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Return a JSON object; one that holds a column twice, of which Python would keep the last, has it under None."""
    row = dict(pairs)
    return row if len(row) == len(pairs) else {None: mode(name for name, _ in pairs)}


def _content(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise AlpacaError(f"{path} cannot be read ({first_line(error)}): write it again.") from error


def _read_json(path: Path) -> Iterable[dict]:
    content = _content(path)
    try:
        rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise AlpacaError(f"{path} is not UTF-8 text at byte {error.start}: save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and content.lstrip()[:1] == b"{":  # a row a line
            return _read_jsonl(path)
        raise AlpacaError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}): mend that line.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        what = f"{path} is no file of rows ({first_line(error)})"
        raise AlpacaError(f"{what}: check that it is the right one.") from error
    if not isinstance(rows, list):
        raise AlpacaError(f"{path} holds no JSON array of rows: write [{{…}}, …], or one row a line as .jsonl.")
    return rows


def _read_jsonl(path: Path) -> Iterator[dict]:
    for number, line in enumerate(io.BytesIO(_content(path)), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise AlpacaError(f"{path}, line {number}: not valid JSON in UTF-8: mend that line.") from error


def _read_parquet(path: Path) -> Iterable[dict]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise AlpacaError(f"{path} cannot be read as Parquet ({error}): write it again.") from error


def _read_csv(path: Path) -> Iterable[dict]:
    try:
        table = pd.read_csv(io.BytesIO(_content(path)), dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:  # not UTF-8, or a row with other columns
        raise AlpacaError(f"{path} cannot be read as CSV in UTF-8 ({first_line(error)}): mend it.") from error
    return table.to_dict("records")


READERS = {"json": _read_json, "jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}


def check_rows(rows: Iterable[dict], source: str) -> Iterator[dict]:
    """Yield each row with only `COLUMNS`; raise AlpacaError naming `source`, the row and what is wrong.

    A question in `input` alone becomes the instruction. Other columns that hold text are named at the end, in a line.
    """
    number, unused = 0, Counter[str]()
    for number, row in enumerate(rows, 1):
        where, checked = f"{source}, row {number}", {}
        if not isinstance(row, dict):
            raise AlpacaError(f"{where}: not an object with `instruction` and `output`: mend that row.")
        if None in row:
            raise AlpacaError(f"{where}: `{row[None]}` is there twice: mend that row.")
        for column in COLUMNS:
            value = row.get(column)
            if value is None and column in ("input", "fact"):
                value = ""
            if column not in row and column in ("instruction", "output"):
                raise AlpacaError(f"{where}: no column `{column}`, {_what_there_is(row)}.")
            if not isinstance(value, str):
                raise AlpacaError(f"{where}: `{column}` is {value!r:.40}, not text: mend that row.")
            if half := HALF_CHARACTER.search(value):
                what = f"holds half a character ({half[0]!a}, a surrogate without its pair)"
                raise AlpacaError(f"{where}: `{column}` {what}: mend that row.")
            checked[column] = value
        if NO_INPUT.fullmatch(checked["input"]):
            checked["input"] = ""
        if not checked["instruction"].strip() and checked["input"].strip():
            checked["instruction"], checked["input"] = checked["input"], ""
        unused.update(column for column in row if column not in (*COLUMNS, REPEATED) and row[column])
        yield checked
    if not number:
        raise AlpacaError(f"{source} has no rows: check that the file is whole.")
    if unused:
        named = ", ".join(f"`{column}` ({count:,} rows)" for column, count in unused.items())
        print(f"Note: these columns of {source} are not used: {named}.", flush=True)


def _what_there_is(row: dict) -> str:
    """Return which columns the row has, and what to do about it."""
    there = f"it has {', '.join(row) or 'none'}"
    if chat := CONVERSATIONS & set(row):
        return f"{there}: write each question of `{min(chat)}` as `instruction` and its answer as `output`"
    renamed = ", ".join(f"`{name}` to `{OTHER_NAMES[name]}`" for name in row if name in OTHER_NAMES)
    return f"{there}: rename {renamed or 'the columns to instruction, input, output'}"
