"""Rows become tokens and labels: filter, split, tokenize."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from datasets import DatasetDict

from . import AlpacaError, portable
from .files import atomic_folder
from .prompts import encode, format_answer, format_prompt
from .rows import COLUMNS
from .run import Run
from .text import plain, words

# What each recipe does beyond the document's: its name is its definition.
RECIPES = {
    "document": frozenset(),
    "document+eos": frozenset({"eos"}),
    "document+answer-loss": frozenset({"answer-loss"}),
    "document+input": frozenset({"input"}),
    "document+dynamic-padding": frozenset({"dynamic-padding"}),
    "answers": frozenset({"eos", "answer-loss", "input", "dynamic-padding"}),
}
RECORDED = {  # of the settings that made a run's data, what its manifest notes
    *("name", "model", "model_revision", "dataset", "dataset_revision", "heldout", "heldout_rows"),
    *("learning_rate", "num_train_epochs", "recipe", "max_words", "max_length", "max_train_rows", "seed"),
}
IGNORED = -100  # the label that torch's cross entropy skips


def drop_reason(row: dict, max_words: int = 80) -> str:
    """Return why the row is not used ("" if it is): an empty side, or an answer of more than `max_words` words."""
    if not row["instruction"].strip():
        return "empty instruction"
    if not row["output"].strip():
        return "empty answer"
    if len(words(row["output"])) > max_words:
        return f"answer over {max_words} words"
    return ""


def question_key(row: dict) -> str:
    """Return what makes two rows the same question: the prompt, as texts are compared."""
    return plain(format_prompt(row["instruction"], row["input"]))


def hold_out(rows: DatasetDict, settings: SimpleNamespace) -> tuple[DatasetDict, Counter[str]]:
    """Return the rows that are used, as `train` and `heldout`, and how many are not used, by reason.

    Rows with an empty side or too long an answer go. The rows held out are those of `rows["heldout"]`, or else all
    rows of `heldout_rows` of the questions, a fifth at most. A question that is held out is in no training row, and of
    the training rows at most `max_train_rows` are kept. Errors as in `check_sides`.
    """
    dropped = Counter(drop_reason(row, settings.max_words) for part in rows.values() for row in part)
    del dropped[""]
    kept = rows.filter(lambda row: not drop_reason(row, settings.max_words), desc="usable rows")
    keys = [question_key(row) for row in kept["train"]]
    if "heldout" in kept:
        asked = set(map(question_key, kept["heldout"]))
        dropped["question held out"] = sum(key in asked for key in keys)
    else:
        questions = sorted(set(keys))
        random.Random(settings.seed).shuffle(questions)
        asked = set(questions[: max(1, min(settings.heldout_rows, len(questions) // 5))])
        kept["heldout"] = kept["train"].select([index for index, key in enumerate(keys) if key in asked])
    train = [index for index, key in enumerate(keys) if key not in asked]
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


def fingerprint(dataset: DatasetDict) -> str:
    """Return the SHA-256 of the text of `train` and `heldout`: the same rows in the same order, wherever stored."""
    digest = hashlib.sha256()
    for part in (dataset["train"], dataset["heldout"]):
        for row in part:
            digest.update(json.dumps([row[column] for column in COLUMNS]).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def tokenize(batch: dict[str, list[str]], tokenizer, recipe: str = "answers", max_length: int = 128) -> dict:
    """Return `input_ids` and `labels` of a batch of rows, each a list of at most `max_length` ids.

    Prompt and answer are tokenized apart, so that training sees the very prompt ids that generation will. Labels are
    `IGNORED` where the recipe learns nothing; an answer cut at `max_length` has no end-of-text token. Without
    `dynamic-padding` rows are padded to `max_length`, under an `attention_mask`, as in the document.
    """
    features, eos, pad = RECIPES[recipe], tokenizer.eos_token_id, tokenizer.pad_token_id
    inputs = batch["input"] if "input" in features else [""] * len(batch["instruction"])
    most = 1000 * max_length  # characters: no token has more, and a million words would take a minute
    prompts = encode([format_prompt(*pair)[:most] for pair in zip(batch["instruction"], inputs)], tokenizer)
    answers = encode([format_answer(output)[:most] for output in batch["output"]], tokenizer, add_special_tokens=False)
    if "eos" in features:
        answers = [answer + [eos] for answer in answers]
    rows = [(prompt + answer)[:max_length] for prompt, answer in zip(prompts, answers)]
    masked = [len(prompt) if "answer-loss" in features else 0 for prompt in prompts]
    labels = [[IGNORED] * min(n, len(row)) + row[n:] for n, row in zip(masked, rows)]
    if "dynamic-padding" in features:
        return {"input_ids": rows, "labels": labels}
    padding = [max_length - len(row) for row in rows]
    return {
        "input_ids": [row + [pad] * n for row, n in zip(rows, padding)],
        "attention_mask": [[1] * len(row) + [0] * n for row, n in zip(rows, padding)],
        "labels": [label + [IGNORED] * n for label, n in zip(labels, padding)],
    }


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
