"""Notebook 02: the rows of a dataset that are used and those that are held out, saved as the run's data."""

import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from datasets import DatasetDict

from alpaca_helpers import AlpacaError, portable
from alpaca_helpers.data import IGNORED, question_key
from alpaca_helpers.files import atomic_folder, check_disk_space, replace_recorded
from alpaca_helpers.rows import COLUMNS, load_rows
from alpaca_helpers.run import Run
from alpaca_helpers.text import words

RECORDED = {  # of the settings that made a run's data, what its manifest notes
    *("name", "model", "model_revision", "dataset", "dataset_revision", "heldout", "heldout_rows"),
    *("learning_rate", "num_train_epochs", "recipe", "max_words", "max_length", "max_train_rows", "seed"),
}


def prepare_rows(folder: Path, dataset: str, revision: str | None = None, heldout: str | None = None) -> dict[str, str]:
    """Return the files of checked rows, by split, that `load_dataset("parquet", data_files=…)` takes.

    They are written to `rows` in the run's `folder`, under its lock. Arguments and errors as in `load_rows` and
    `replace_recorded`; `heldout` is a file with rows held out already.
    """
    sources = {"train": (dataset, revision)} | ({"heldout": (heldout, None)} if heldout else {})
    files = {}
    with Run(folder).lock():
        for split, source in sources.items():
            path, table, rows = folder / "rows" / f"{split}.parquet", io.BytesIO(), load_rows(*source)
            rows.to_parquet(table)
            content = table.getvalue()
            # not written twice: load_dataset would cache the same rows again
            if not path.is_file() or path.read_bytes() != content:
                with check_disk_space(path, needed=len(content) + rows.data.nbytes):  # with that cache
                    replace_recorded(path, content)
            files[split] = str(path)
    return files


def drop_reason(row: dict, max_words: int = 80) -> str:
    """Return why the row is not used ("" if it is): an empty side, or an answer of more than `max_words` words."""
    if not row["instruction"].strip():
        return "empty instruction"
    if not row["output"].strip():
        return "empty answer"
    if len(words(row["output"])) > max_words:
        return f"answer over {max_words} words"
    return ""


def hold_out(rows: DatasetDict, settings: SimpleNamespace) -> tuple[DatasetDict, Counter[str]]:
    """Return the rows that are used, as `train` and `heldout`, and how many are not used, by reason.

    Rows with an empty side or too long an answer go. The rows held out are those of `rows["heldout"]`, or else all
    rows of `heldout_rows` of the questions, a fifth at most. A question that is held out is in no training row, be it
    asked with its `input` or without, as the recipe `document` does. Of the training rows at most `max_train_rows` are
    kept. Errors as in `check_sides`.
    """
    dropped = Counter(drop_reason(row, settings.max_words) for part in rows.values() for row in part)
    del dropped[""]
    kept = rows.filter(lambda row: not drop_reason(row, settings.max_words), desc="usable rows")
    keys = [(question_key(row), question_key(row | {"input": ""})) for row in kept["train"]]
    if "heldout" in kept:
        asked = set(map(question_key, kept["heldout"]))
    else:
        questions = sorted({key for key, _ in keys})
        random.Random(settings.seed).shuffle(questions)
        asked = set(questions[: max(1, min(settings.heldout_rows, len(questions) // 5))])
        kept["heldout"] = kept["train"].select([index for index, (key, _) in enumerate(keys) if key in asked])
    train = [index for index, either in enumerate(keys) if asked.isdisjoint(either)]
    dropped["question held out"] = len(keys) - len(train) - (0 if "heldout" in rows else len(kept["heldout"]))
    used = train[: settings.max_train_rows]
    dropped["after the first max_train_rows"] = len(train) - len(used)
    split = DatasetDict(train=kept["train"].select(used), heldout=kept["heldout"])
    check_sides(split)
    return split, +dropped


def check_sides(dataset: DatasetDict) -> None:
    """Raise AlpacaError unless there are rows to train on and held-out rows."""
    train, heldout = len(dataset["train"]), len(dataset["heldout"])
    if not (train and heldout):
        what = f"{train} rows are left to train on and {heldout} are held out; both need at least one question"
        raise AlpacaError(f"{what}: choose another dataset or held-out file, or raise `max_length`.")


def note_losses(lost: Mapping[str, int], read: int) -> None:
    """Print a line for each reason why more than a fifth of the rows read are not used, or cut, with what to do."""
    for reason, count in lost.items():
        if count > read / 5 and "max_train_rows" not in reason:
            remedy = "raise `max_words` or `max_length`, or change those rows"
            print(f"Note: {count:,} of {read:,} rows are lost or cut ({reason}): {remedy}.", flush=True)


def has_answer(row: dict) -> bool:
    """Return whether a tokenized row has anything to learn; one without gives a NaN loss."""
    return any(label != IGNORED for label in row["labels"][1:])  # nothing precedes the first token: it is not learned


@contextmanager
def save_data(folder: Path, settings: SimpleNamespace, split: DatasetDict) -> Iterator[Path]:
    """Give a folder to save the tokenized rows to, which becomes the run's `data`, whole or not at all.

    The manifest then notes the settings that made them of the rows of text in `split`.
    """
    chosen = {name: value for name, value in vars(settings).items() if name in RECORDED}
    record = {name: portable(value) if isinstance(value, str) else value for name, value in chosen.items()}
    run = Run(folder)
    record["fingerprint"] = fingerprint(split)
    with run.lock():
        with atomic_folder(folder / "data") as part:
            yield part
            run.write_record("data", {})  # killed before the new one, it has none rather than that of other rows
        run.write_record("data", record)


def fingerprint(dataset: DatasetDict) -> str:
    """Return the SHA-256 of the text of `train` and `heldout`: the same rows in the same order, wherever stored."""
    digest = hashlib.sha256()
    for part in (dataset["train"], dataset["heldout"]):
        for row in part:
            digest.update(json.dumps([row[column] for column in COLUMNS]).encode())
        digest.update(b"\0")
    return digest.hexdigest()
