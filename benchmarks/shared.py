"""What the benchmarks share: models and rows to measure with, and rounds in which all that is compared takes turns."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, Trainer, TrainerCallback

from alpaca_helpers import pocket
from alpaca_helpers.config import PROFILES
from alpaca_helpers.data import tokenize
from alpaca_helpers.lora import lora_config
from alpaca_helpers.models import base_dtype, best_device, load_base, load_tokenizer
from alpaca_helpers.rows import load_rows
from alpaca_lessons.dataset import drop_reason

PROJECT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("ALPACA_TEST_DATA", PROJECT.parent / "shared" / "data"))  # real rows and vocabulary
SHAPES = {"gpt2": {}, "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16}}

Value = TypeVar("Value")


def load_model(name: str, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Return the pocket model, or random weights of a GPT-2's true shape."""
    if name == "pocket":
        return load_base(str(pocket.MODEL), dtype=dtype)
    torch.manual_seed(0)
    with torch.device(best_device()):
        return GPT2LMHeadModel(GPT2Config(**SHAPES[name])).to(dtype)


def load_tuned(name: str, **settings) -> PeftModel:
    """Return the model under an adapter that changes what it says; `settings` are LoRA's."""
    model = get_peft_model(load_model(name, base_dtype()), lora_config(**settings))
    for parameter_name, value in model.named_parameters():
        if "lora_B" in parameter_name:  # zero as it comes, so that A would have no gradient
            torch.nn.init.normal_(value, std=0.02)
    return model


def load_data(name: str) -> tuple[Dataset, GPT2Tokenizer]:
    """Return rows and the tokenizer: the real ones, or the pocket's for the pocket and where no real ones are."""
    if name == "pocket" or not REAL.is_dir():
        return load_rows(str(pocket.TRAIN)), load_tokenizer(str(pocket.MODEL))
    vocabulary = REAL / "gpt2-tokenizer"
    tokenizer = GPT2Tokenizer(vocab=str(vocabulary / "vocab.json"), merges=str(vocabulary / "merges.txt"))
    tokenizer.pad_token = tokenizer.eos_token
    rows = load_rows(str(REAL / "alpaca_en_demo.json")).filter(lambda row: not drop_reason(row))
    return rows.shuffle(seed=0), tokenizer


def tokenized(rows: Dataset, tokenizer, **settings) -> Dataset:
    """Return the rows as the series trains on them; `settings` are those of `Dataset.map`."""
    options = {"fn_kwargs": {"tokenizer": tokenizer}, "remove_columns": rows.column_names}
    return rows.map(tokenize, batched=True, **options, **settings)


def common(name: str, batch_size: int, folder: str, steps: int, at_once: int | None = None) -> dict:
    """Return the training arguments that all share, but for the rows `at_once`: what suits best, or all of a batch.

    Nothing is saved, evaluated or logged on the way.
    """
    at_once = at_once or batch_size
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": PROFILES["pocket" if name == "pocket" else "gpt2-medium"].learning_rate,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": batch_size // at_once,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": 0,
    }


class Stopwatch(TrainerCallback):
    """Takes the time from the beginning of the optimizer step after `warm_up` others."""

    def __init__(self, warm_up: int):
        self.warm_up = warm_up

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.warm_up:
            self.begun = self.now()

    def now(self) -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def timed_training(trainer: Trainer, warm_up: int) -> tuple[float, float]:
    """Train; return the seconds that the steps after the first `warm_up` took, by the clock and of processor time."""
    watch = Stopwatch(warm_up)
    trainer.add_callback(watch)
    trainer.train()
    return tuple(now - then for now, then in zip(watch.now(), watch.begun))


def in_turns(ways: Mapping[str, Callable[[], Value]], rounds: int) -> dict[str, list[Value]]:
    """Call each way once a round and return what it returned: what disturbs the machine disturbs them all."""
    results: dict[str, list[Value]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            results[way].append(call())
    return results


def spread(values: list[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def peak_memory() -> float:
    """Return this process's peak memory in GB: the GPU's where there is one, else all that is resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    kilo = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9
