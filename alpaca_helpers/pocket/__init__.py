"""The pocket: a small GPT-2 made by this project, with its facts and its instruction rows."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"  # weights and tokenizer, as `from_pretrained` reads them
TRAIN = FOLDER / "instructions" / "train.jsonl"
HELDOUT = FOLDER / "instructions" / "heldout.jsonl"
