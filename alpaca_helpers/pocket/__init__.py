"""The pocket: a GPT-2 of a million parameters and its instructions, small enough to ship with the lessons.

`MODEL` is a folder for `from_pretrained`; `TRAIN` and `HELDOUT` are JSONL files of instruction rows.
`python -m alpaca_helpers.pocket.build` makes all three from the facts in `facts/`.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
FACTS = FOLDER / "facts"
MODEL = FOLDER / "model"
INSTRUCTIONS = FOLDER / "instructions"
TRAIN = INSTRUCTIONS / "train.jsonl"
HELDOUT = INSTRUCTIONS / "heldout.jsonl"
