"""Long use: no tensor and no thread stays behind, a large dataset goes through: `ALPACA_LOAD=full` for all of it."""

import gc
import json
import os
import threading

import pytest
import torch

from alpaca_helpers.chat.conversation import Conversation
from alpaca_helpers.data import tokenize
from alpaca_helpers.generation import generate
from alpaca_helpers.prompts import format_prompt
from alpaca_helpers.rows import load_rows
from alpaca_lessons.dataset import drop_reason

pytestmark = pytest.mark.nightly

FULL = os.environ.get("ALPACA_LOAD") == "full"
QUESTIONS, TURNS, ROWS = (1000, 100, 520_000) if FULL else (100, 20, 52_000)


def left() -> tuple[int, int, int]:
    """Return how many tensors live, how many numbers they hold, and how many threads there are."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return len(tensors), sum(tensor.numel() for tensor in tensors), threading.active_count()


def test_questions_and_turns_one_after_the_other_leave_nothing_behind(tiny_model, pocket_tokenizer):
    def ask(number):
        for n in range(number):
            prompt = format_prompt(f"Question {n}: {'word ' * (n % 40)}")
            generate(tiny_model, pocket_tokenizer, [prompt], max_new_tokens=10)

    def talk(number):
        for turn in range(number):
            list(conversation.answer(conversation.add(f"Turn {turn} " + "word " * (turn % 40))))

    conversation = Conversation(tiny_model, pocket_tokenizer, max_new_tokens=10)
    for use, number in ((ask, QUESTIONS), (talk, TURNS)):
        use(40)  # as many as there are lengths
        before = left()
        use(number)
        assert left() == before, use.__name__


def test_a_large_dataset_is_filtered_and_tokenized(tmp_path, pocket_tokenizer):
    with open(tmp_path / "rows.jsonl", "w") as file:
        for n in range(ROWS):  # as long as Alpaca's: 60 characters asked, 270 answered; one in ten too long
            words = " word" * (52 if n % 10 else 90)
            row = {"instruction": f"Question {n} about the thing that is asked for", "output": str(n) + words}
            file.write(json.dumps(row) + "\n")
    kept = load_rows(str(tmp_path / "rows.jsonl")).filter(lambda row: not drop_reason(row))
    rows = kept.map(tokenize, batched=True, fn_kwargs={"tokenizer": pocket_tokenizer})
    assert len(rows) == ROWS - ROWS // 10 and rows[-1]["instruction"].startswith(f"Question {ROWS - 1} about")
