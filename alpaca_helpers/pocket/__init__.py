"""The pocket: a GPT-2 of a million parameters and its instructions, small enough to ship with the lessons.

`MODEL` is a folder for `from_pretrained`; `TRAIN` and `HELDOUT` are JSONL files of instruction rows.
`python -m alpaca_helpers.pocket.build` makes all three from the tables in `FACTS`.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
FACTS = FOLDER / "facts"
MODEL = FOLDER / "model"
TRAIN = FOLDER / "instructions" / "train.jsonl"
HELDOUT = FOLDER / "instructions" / "heldout.jsonl"
