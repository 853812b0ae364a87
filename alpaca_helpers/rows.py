"""Instruction rows read from a file or the Hub and checked, before `load_dataset` gets them.

A row has the text columns `instruction`, `input` (may be empty) and `output`, and may have a `fact`: the words that
a right answer holds. Source: Alpaca's format (Taori et al., 2023). Files are not read by `datasets` itself: it
turns "007" into 7, "NA" into None and "2001-01-01" into a date, keeps one of two equal columns, and names no row.
"""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from . import AlpacaError, locate
from .hub import cached_folder, fetch, first_line

COLUMNS = ("instruction", "input", "output", "fact")
NOT_MISSED = {*COLUMNS, "text", "", "Unnamed: 0"}  # "text" in Alpaca's files: the others in one; pandas' row numbers
NO_INPUT = re.compile(r"[\W_]*(no[\W_]*input|n/a)[\W_]*", re.IGNORECASE)  # as Alpaca's generator wrote it
ONLY_FILE = {  # of a pinned dataset, by its commit
    "dce01c9b08f87459cf36a430d809084718273017": "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"
}
DATA_FILES = ["*.parquet", "*.json", "*.jsonl", "*.jsonl.*", "*.csv", "*.arrow", "README.md"]
OTHER_FILES = {"arrow", "bz2", "txt", "xls", "xlsx", "xz", "zip", "zst"}  # not read; no dataset's name ends so
SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # between rows; the last is the mark that a text file may begin with
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 and so Arrow cannot
HUB_NAME = re.compile(r"[^./~][^/]*/[^/]+")


def load_rows(dataset: str, revision: str | None = None) -> Dataset:
    """Return the rows of a file or a folder of Parquet files, or of a dataset's train split on the Hub.

    The columns are `COLUMNS`, all text; a missing `input` or `fact` is "". The Hub is asked only for a name of the form
    owner/name that is no path here and does not end like a file. Raises AlpacaError that names file and row.
    """
    path = locate(dataset, typed=True)
    if os.path.isdir(path):
        files = [file for file in sorted(path.iterdir()) if _kind(file) == "parquet"]
    else:
        files = [path] if _kind(path) in READERS and os.path.isfile(path) else []
    if files:
        rows = (row for file in files for row in _read(file))
    elif _kind(path) in {*READERS, *OTHER_FILES} or os.path.lexists(path) or not HUB_NAME.fullmatch(dataset):
        forms = f"a file here (.{', .'.join(READERS)}, also .gz) nor a folder of .parquet files"
        what = f"The dataset {dataset} is neither {forms}, nor a name on the Hub (owner/name)"
        raise AlpacaError(f"{what}: check the parameter `dataset_name`.")
    else:
        rows = iter(_hub_rows(dataset, revision))
    return Dataset.from_list(list(check_rows(rows, dataset)))


def _hub_rows(name: str, revision: str | None) -> Dataset:
    """Return the train split of a dataset on the Hub, from the cache if it is known to hold all of it."""
    folder, only_file = cached_folder(name, revision, "dataset", DATA_FILES), ONLY_FILE.get(revision or "")
    if folder is None or not only_file or not (folder / only_file).exists():
        try:
            folder = fetch(name, revision, "dataset", DATA_FILES)
        except AlpacaError as error:
            if folder is None or only_file:
                raise
            print(f"Using what the cache holds of {name}. {error}", flush=True)
    try:
        return load_dataset(str(folder), split="train")
    except (OSError, ValueError, DatasetsError) as error:
        what = f"The dataset {name} in {folder} has no train split that can be read ({first_line(error)})"
        raise AlpacaError(f"{what}: choose another.") from error


def _kind(path: Path) -> str:
    """Return a file's ending in lower case, without the dot and without a `.gz` after it."""
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def _read(path: Path) -> Iterator[Any]:
    """Yield the rows of a file, compressed by gzip or not; raise AlpacaError that names it and what is broken where."""
    try:
        content = path.read_bytes()
        yield from READERS[_kind(path)](gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except Exception as error:  # the readers' differ: of gzip, zlib, JSON, csv, Arrow, Python's dates
        what = f"{path} cannot be read ({first_line(error)})"
        raise AlpacaError(f"{what}: correct it, or save it again, text as UTF-8.") from error


def _row(pairs: list[tuple[str, object]]) -> Any:
    """Return the row; the pairs themselves if a name comes twice, of which a dict would keep the last."""
    row = dict(pairs)
    return row if len(row) == len(pairs) else pairs


def _read_json(content: bytes) -> Iterator[Any]:
    """Yield the rows of a JSON array or of JSON Lines, also of several put together."""
    text, place, decoder = content.decode(), 0, json.JSONDecoder(object_pairs_hook=_row)
    while (space := SPACE.match(text, place)) and (place := space.end()) < len(text):
        value, place = decoder.raw_decode(text, place)
        yield from value if isinstance(value, list) else [value]


def _read_parquet(content: bytes) -> Iterator[Any]:
    table = pyarrow.parquet.ParquetFile(io.BytesIO(content)).read()
    for values in zip(*(column.to_pylist() for column in table.columns)):
        yield _row(list(zip(table.column_names, values)))


def _read_csv(content: bytes) -> Iterator[Any]:
    """Yield the rows under the names in the first line; commas, semicolons or tabs separate the fields."""
    text, line, names = content.decode("utf-8-sig"), 1, list[str]()
    text = re.sub("^sep=.", "", text)  # Excel's first line, for Excel
    delimiter = max(",;\t", key=text.strip("\r\n").partition("\n")[0].count)
    csv.field_size_limit(2**31 - 1)  # characters in a field; Python's own limit is 131,072
    spaced = bool(re.search(f'{delimiter} +"[^"{delimiter}\r\n]', text))  # "a", "b"; within quotes they are doubled
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced, strict=True)
    try:
        for fields in lines:
            while len(fields) > len(names) and not fields[-1]:  # after a delimiter at the line's end
                fields.pop()
            if names and fields:
                if len(fields) != len(names):
                    raise csv.Error(f"{len(fields)} fields under {len(names)} names")
                yield _row(list(zip(names, fields)))
            names, line = names or fields, lines.line_num + 1
    except csv.Error as error:
        raise ValueError(f'line {line}: {error}; quote a field with commas, write "" for a quote') from error


READERS = {"json": _read_json, "jsonl": _read_json, "csv": _read_csv, "tsv": _read_csv, "parquet": _read_parquet}


def check_rows(rows: Iterable[Any], source: str) -> Iterator[dict]:
    """Yield each row with only `COLUMNS`; raise AlpacaError naming `source`, the row and what is wrong.

    A question in `input` alone becomes the instruction. A last line names the other columns that are not empty.
    """
    number, filled = 0, dict[str, None]()
    for number, row in enumerate(rows, 1):
        if wrong := _fault(row):
            remedy = "correct it: a row has the texts `instruction` and `output`, and may have an `input`"
            raise AlpacaError(f"{source}, row {number}: {wrong}; {remedy}.")
        checked = {column: row.get(column) or "" for column in COLUMNS}
        if NO_INPUT.fullmatch(checked["input"]):
            checked["input"] = ""
        if not checked["instruction"].strip() and checked["input"].strip():
            checked["instruction"], checked["input"] = checked["input"], ""
        filled |= dict.fromkeys(column for column in row if row[column])
        yield checked
    if not number:
        raise AlpacaError(f"{source} has no rows: check that the file is whole.")
    if unused := ", ".join(f"`{column}`" for column in filled if column not in NOT_MISSED):
        print(f"Note: these columns of {source} are not used: {unused}.", flush=True)


def _fault(row: Any) -> str:
    """Return what is wrong with a row, "" if nothing is."""
    if not isinstance(row, dict):
        return "not an object whose names are all different"
    if half := HALF_CHARACTER.search("".join([*row, *(text for text in row.values() if isinstance(text, str))])):
        return f"it holds half a character ({half[0]!a})"
    for column in COLUMNS:
        value = row.get(column)
        if not isinstance(value, str) and (value is not None or column in ("instruction", "output")):
            names = " ".join(", ".join(row).split())  # a line of text, where a CSV has none of names
            return f"`{column}` is {value!r:.40}, not text; its columns are {names or 'none':.200}"
    return ""
