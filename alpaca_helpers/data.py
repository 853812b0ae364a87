"""Rows become tokens and labels, by recipe."""

from .prompts import encode, format_answer, format_prompt
from .text import plain

# What each recipe does beyond that of the document, the text that the series starts from.
RECIPES = {
    "document": frozenset(),
    "document+eos": frozenset({"eos"}),
    "document+answer-loss": frozenset({"answer-loss"}),
    "document+input": frozenset({"input"}),
    "document+dynamic-padding": frozenset({"dynamic-padding"}),
    "answers": frozenset({"eos", "answer-loss", "input", "dynamic-padding"}),
}
IGNORED = -100  # the label that torch's cross entropy skips


def question_key(row: dict) -> str:
    """Return what makes two rows the same question: the prompt, as texts are compared."""
    return plain(format_prompt(row["instruction"], row["input"]))


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
