"""Long use: memory stays flat, no thread stays behind, large datasets fit: `python -m pytest tests/test_load.py`.

By default a tenth of the load; all of it (minutes): `ALPACA_LOAD=full python -m pytest tests/test_load.py -s`.
"""

import gc
import os
import subprocess
import sys
import threading

import psutil
import pytest
from support import PROJECT

from alpaca_helpers import pocket
from alpaca_helpers.chat.conversation import Conversation
from alpaca_helpers.generation import generate
from alpaca_helpers.prompts import format_prompt

pytestmark = pytest.mark.integration

FULL = os.environ.get("ALPACA_LOAD") == "full"
QUESTIONS, TURNS, ROWS = (1000, 100, 520_000) if FULL else (100, 20, 52_000)


def memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def test_questions_one_after_the_other_leave_memory_and_threads_as_they_were(tiny_model, pocket_tokenizer):
    prompts = [format_prompt(f"Question {n}: " + "word " * (n % 40)) for n in range(QUESTIONS)]
    ask = lambda chosen: [generate(tiny_model, pocket_tokenizer, [p], max_new_tokens=10) for p in chosen]  # noqa: E731
    ask(prompts[: max(40, QUESTIONS // 10)])  # warm up
    before, threads = memory(), threading.active_count()
    ask(prompts)
    after = memory()
    print(f"{QUESTIONS} questions: {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB")
    assert after < 1.05 * before and threading.active_count() <= threads


def test_a_long_conversation_leaves_memory_and_threads_as_they_were(tiny_model, pocket_tokenizer):
    talk = Conversation(tiny_model, pocket_tokenizer, max_new_tokens=10)

    def turns(number):
        for turn in range(number):
            for _ in talk.answer(talk.add(f"Turn {turn} " + "word " * (turn % 40))):
                pass

    turns(40)
    before, threads = memory(), threading.active_count()
    turns(TURNS)
    after = memory()
    print(f"{TURNS} turns: {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB")
    assert after < 1.05 * before and threading.active_count() <= threads


LARGE = """
import json, resource, sys, time
from pathlib import Path
from alpaca_helpers.data import drop_reason, tokenize
from alpaca_helpers.models import load_tokenizer
from alpaca_helpers.rows import load_rows
path, number, model = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with open(path, "w") as file:
    for n in range(number):  # as long as Alpaca's: 60 characters asked, 270 answered; one in ten too long
        words = " word" * (52 if n % 10 else 90)
        row = {"instruction": f"Question {n} about the thing that is asked for", "input": "", "output": str(n) + words}
        file.write(json.dumps(row) + "\\n")
start = time.time()
read = load_rows(path)
kept = read.filter(lambda row: not drop_reason(row))
tokenizer = load_tokenizer(model)
rows = kept.map(tokenize, batched=True, fn_kwargs={"tokenizer": tokenizer})
assert len(rows) == number - number // 10, len(rows)
status = Path("/proc/self/status")  # Linux: its getrusage counts what the parent of a new process had in memory
kilobytes = [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
peak = int(kilobytes[0]) * 1024 if kilobytes else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"rows": number, "peak_bytes": peak, "seconds": round(time.time() - start, 1)}))
"""


def test_a_large_dataset_is_filtered_and_tokenized_in_bounded_memory(tmp_path):
    import json

    command = [sys.executable, "-c", LARGE, str(tmp_path / "rows.jsonl"), str(ROWS), str(pocket.MODEL)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    print(said)
    # importing torch and the rest takes 0.4 GB whatever the rows; 520,000 rows are to fit in 2 GB
    assert said["peak_bytes"] < (2e9 if FULL else 0.8e9)
