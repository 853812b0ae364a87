"""A run prepared for training in a second: random rows of bytes, a random GPT-2 of 2 layers x 32."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from alpaca_helpers.cells import NOTEBOOKS, read_cells
from alpaca_helpers.checkpoints import last_complete_checkpoint
from alpaca_helpers.config import choose_profile
from alpaca_helpers.data import tokenize
from alpaca_helpers.files import atomic_folder, content_hash
from alpaca_helpers.lora import adapter_folder
from alpaca_helpers.models import load_base, load_tokenizer
from alpaca_helpers.run import MARK, Run
from alpaca_lessons.dataset import fingerprint
from support import PROJECT
from support.models import save, with_lora

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
HOLD = """
import sys, time
from pathlib import Path
from alpaca_helpers.run import Run
with Run(Path(sys.argv[1])).lock():
    print("at it", flush=True)
    time.sleep(60)
"""


@contextmanager
def locked_elsewhere(folder: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of the run in `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, cwd=PROJECT)
    try:
        assert process.stdout.readline() == b"at it\n"
        yield process
    finally:
        process.kill()
        process.wait()


def byte_tokenizer() -> GPT2Tokenizer:
    """GPT-2's tokenizer without merges: a token a byte, and the end of text."""
    symbols = [*bytes_to_unicode().values(), "<|endoftext|>"]
    tokenizer = GPT2Tokenizer(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[])
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tiny_gpt2(**changes) -> GPT2LMHeadModel:
    """A random GPT-2 over `byte_tokenizer`, with weights large enough for its answers to differ."""
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**shape | {"bos_token_id": 256, "eos_token_id": 256} | changes))


def random_rows(number: int, seed: int = 0) -> Dataset:
    """Rows of instruction, input and output, of many lengths."""
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(draw.randint(1, most)))

    rows = [{"instruction": words(5), "input": words(3), "output": words(6), "fact": ""} for _ in range(number)]
    return Dataset.from_list(rows)


def save_adapter(model, tokenizer, folder: Path) -> None:
    """Save the adapter as notebook 03's cell does."""
    with adapter_folder(folder, model, model.get_base_model().name_or_path or "base") as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def record_adapter(folder: Path, **made) -> None:
    """Write into the manifest what notebook 03 records of the adapter in `folder`."""
    about = {"name": "pocket", "model": "base", "dataset": "rows", "recipe": "answers", "fingerprint": "a"}
    about |= {"max_length": 128, "seed": 0, "lora_rank": 8, "learning_rate": 3e-4, "num_train_epochs": 2}
    about |= {"model_revision": None, "sha256": content_hash(folder / "adapter", "*.safetensors")}
    Run(folder).write_record("adapter", about | made)


def finished_run(folder: Path, kind: str = "gpt2", std: float = 0.2) -> Path:
    """Write base (if need be), adapter and record of a run of the tiny model; return the folder."""
    base = folder / "base" if (folder / "base").is_dir() else save(kind, folder / "base")
    tuned = with_lora(load_base(str(base)), std, target_modules="all-linear")
    save_adapter(tuned, load_tokenizer(str(base)), folder / "adapter")
    record_adapter(folder, model=str(base))
    return folder


def prepare_run(folder: Path, rows: int = 44, recipe: str = "answers", **changes) -> dict:
    """Write what notebook 02 leaves to notebook 03, and the base model beside it; return notebook 03's parameters."""
    tiny_gpt2(**(NO_DROPOUT if changes.get("lora_dropout") == 0 else {})).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    (folder / MARK).touch()
    text = DatasetDict(train=random_rows(rows), heldout=random_rows(8, seed=1))
    options = {"tokenizer": byte_tokenizer(), "recipe": recipe}
    with atomic_folder(folder / "data") as part:
        text.map(tokenize, batched=True, fn_kwargs=options).save_to_disk(part)
    profile = asdict(choose_profile("pocket", model=str(folder / "base")))
    made = {"max_words": 80, "max_length": 128, "max_train_rows": None, "recipe": recipe, "seed": 0}
    Run(folder).write_record("data", profile | made | {"fingerprint": fingerprint(text)})
    settings = {"num_train_epochs": 4, "batch_size": 8, **changes}
    (folder / "settings.json").write_text(json.dumps(settings))  # for a process that trains in the run
    return settings


def notebook_03(folder: Path, until: str, **parameters):
    """Run notebook 03's cells of training on the run until this name is defined, and return what it stands for."""
    names = {}
    for cell in read_cells(NOTEBOOKS[2], "parameters") + read_cells(NOTEBOOKS[2], "training"):
        exec(cell["source"], names)
        if until in names:
            return names[until]
        if "settings" not in names:
            names |= parameters | {"run": str(folder), "run_earlier": False}
    raise LookupError(until)


def history(folder: Path) -> list[dict]:
    """The losses by step, from the newest checkpoint, without timings."""
    newest = last_complete_checkpoint(folder / "checkpoints")
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in kept if name in entry} for entry in log]
