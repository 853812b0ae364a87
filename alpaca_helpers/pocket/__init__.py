"""The pocket: a GPT-2 of a million parameters and its instructions, small enough to ship with the lessons.

`MODEL` is a folder for `from_pretrained`; `TRAIN` and `HELDOUT` are JSONL files of instruction rows. `DOCUMENT` is a
finished run of the recipe `document` on them, its adapter and its record, for notebooks 03 and 04 to compare with.
How they are made is in the project's folder `dev/pocket/`, which is not installed.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
TRAIN = FOLDER / "instructions" / "train.jsonl"
HELDOUT = FOLDER / "instructions" / "heldout.jsonl"
DOCUMENT = FOLDER / "document"
