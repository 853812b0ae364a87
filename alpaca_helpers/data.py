"""Rows become tokens and labels: load, check, filter, split, tokenize.

A row has the text columns `instruction`, `input` (may be empty) and `output`, and may have a `fact`: the words that
a right answer holds. Source: Alpaca's format (Taori et al., 2023).
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from . import AlpacaError, locate
from .hub import cached_folder, fetch, first_line
from .prompts import format_answer, format_prompt

COLUMNS = ("instruction", "input", "output", "fact")
NO_INPUT = {"noinput", "<noinput>", "no input", "n/a"}  # how Alpaca's generator wrote "this row has no input"

# What each recipe does beyond the document's: its name is its definition.
RECIPES = {
    "document": frozenset(),
    "document+eos": frozenset({"eos"}),
    "document+answer-loss": frozenset({"answer-loss"}),
    "document+input": frozenset({"input"}),
    "answers": frozenset({"eos", "answer-loss", "input"}),
}
# A pinned dataset by its commit: its one file, columns and rows.
KNOWN = {
    "dce01c9b08f87459cf36a430d809084718273017": (
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
        ("instruction", "input", "output", "text"),
        52_002,
    )
}
DATA_FILES = ("*.parquet", "*.json", "*.jsonl", "*.jsonl.*", "*.csv", "*.arrow", "README.md")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 and so Arrow cannot
IGNORED = -100  # the label that torch's cross entropy skips


def load_rows(dataset: str, revision: str | None = None) -> Dataset:
    """Return the rows of a JSON, JSONL or Parquet file, or of a dataset's train split on the Hub.

    The columns are `COLUMNS`, all text; a missing `input` or `fact` is "". What ends in .json, .jsonl or .parquet, or
    is not of the form owner/name, is never looked up on the Hub.

    Raises AlpacaError that names file and row.
    """
    path = locate(dataset)
    if path.suffix in READERS:
        if not path.is_file():
            raise AlpacaError(f"There is no dataset file {dataset}: check the parameter `dataset`.")
        return Dataset.from_list(list(check_rows(READERS[path.suffix](path), dataset)))
    if path.exists() or dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        raise AlpacaError(
            f"The dataset {dataset} is neither a .json, .jsonl or .parquet file nor a name on the Hub (owner/name): "
            "check the parameter `dataset`."
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
    """In the place of a JSON object that holds a column twice: Python would keep the last one alone."""

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
    """Yield each row with `COLUMNS` alone; raise AlpacaError naming `source` and the row that is no text."""
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


def drop_reason(row: dict, max_words: int = 80) -> str:
    """Return why the row is not used ("" if it is): an empty side, or an answer of more than `max_words` words."""
    if not row["instruction"].strip():
        return "empty instruction"
    if not row["output"].strip():
        return "empty answer"
    if len(row["output"].split()) > max_words:
        return f"answer over {max_words} words"
    return ""


def filter_rows(rows: Dataset, max_words: int = 80) -> tuple[Dataset, dict[str, int]]:
    """Return the rows to use and how many were dropped, by reason.

    Raises AlpacaError if none is left.
    """
    reasons = [drop_reason(row, max_words) for row in rows]
    dropped = Counter(reason for reason in reasons if reason)
    kept = rows.select([index for index, reason in enumerate(reasons) if not reason])
    if not len(kept):
        raise AlpacaError(f"No row is left of {len(rows)} ({dict(dropped)}): check the dataset, or raise `max_words`.")
    return kept, dict(dropped)


def question_key(row: dict) -> str:
    """Return what makes two rows the same question: the prompt, without regard to case and spacing."""
    return " ".join(format_prompt(row["instruction"], row["input"]).casefold().split())


def split_rows(rows: Dataset, heldout_rows: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Return train and held-out rows; rows with the same question land on the same side.

    At most a fifth of the questions are held out (at least one), whatever `heldout_rows` asks.
    """
    keys = [question_key(row) for row in rows]
    questions = sorted(set(keys))
    if len(questions) < 2:
        raise AlpacaError("The dataset holds one question only: a held-out part needs at least two.")
    random.Random(seed).shuffle(questions)
    wanted = max(1, min(heldout_rows, len(questions) // 5))
    heldout = set(questions[:wanted])
    sides = [key in heldout for key in keys]
    return tuple(rows.select([i for i, held in enumerate(sides) if held == side]) for side in (False, True))


def drop_shared(train: Dataset, heldout: Dataset) -> tuple[Dataset, int]:
    """Return the rows to train on whose question is not held out, and how many were dropped.

    Raises AlpacaError if none is left.
    """
    asked = {question_key(row) for row in heldout}
    kept = train.select([index for index, row in enumerate(train) if question_key(row) not in asked])
    if not len(kept):
        raise AlpacaError("Every question to train on is held out too: choose another held-out file.")
    return kept, len(train) - len(kept)


def fingerprint(*parts: Dataset) -> str:
    """Return the SHA-256 of the rows' text: the same rows in the same order, wherever they are stored."""
    digest = hashlib.sha256()
    for part in parts:
        for row in part:
            digest.update(json.dumps([row[column] for column in COLUMNS]).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def tokenize(batch: dict[str, list[str]], tokenizer, recipe: str = "answers", max_length: int = 128) -> dict:
    """Return `input_ids` and `labels` of a batch of rows, each a list of at most `max_length` ids.

    Prompt and answer are tokenized apart, so that training sees the very prompt ids that generation will. Labels are
    `IGNORED` where the recipe learns nothing; an answer cut at `max_length` has no end-of-text token. The recipe
    `document` pads to `max_length` with the end-of-text token, under an `attention_mask`, as the document does.

    Args:
        batch: the columns `instruction`, `input`, `output`, as `Dataset.map(batched=True)` gives them.
        recipe: a key of `RECIPES`.

    Raises AlpacaError for an unknown recipe.
    """
    if recipe not in RECIPES:
        raise AlpacaError(f"There is no recipe {recipe!r}: choose {', '.join(RECIPES)}.")
    features, eos = RECIPES[recipe], tokenizer.eos_token_id
    inputs = batch["input"] if "input" in features else [""] * len(batch["instruction"])
    prompts = encode([format_prompt(*pair) for pair in zip(batch["instruction"], inputs)], tokenizer)
    answers = encode([format_answer(output) for output in batch["output"]], tokenizer)
    if "eos" in features:
        answers = [answer + [eos] for answer in answers]
    rows = [(prompt + answer)[:max_length] for prompt, answer in zip(prompts, answers)]
    masked = [len(prompt) if "answer-loss" in features else 0 for prompt in prompts]
    labels = [[IGNORED] * min(n, len(row)) + row[n:] for n, row in zip(masked, rows)]
    if recipe != "document":
        return {"input_ids": rows, "labels": labels}
    padding = [max_length - len(row) for row in rows]
    return {
        "input_ids": [row + [eos] * n for row, n in zip(rows, padding)],
        "attention_mask": [[1] * len(row) + [0] * n for row, n in zip(rows, padding)],
        "labels": [label + [IGNORED] * n for label, n in zip(labels, padding)],
    }


def encode(texts: list[str], tokenizer) -> list[list[int]]:
    """Return the ids of each text; special tokens typed in a text stay plain text."""
    return tokenizer(texts, split_special_tokens=True, add_special_tokens=False, return_attention_mask=False)[
        "input_ids"
    ]


def has_answer(row: dict) -> bool:
    """Return whether a tokenized row has anything to learn; one without gives a NaN loss.

    The first token has no label: nothing precedes it.
    """
    return any(label != IGNORED for label in row["labels"][1:])
