"""Speed and memory of what the series does: `python -m benchmarks.bench --help`.

Contenders live in processes of their own (so that each has its own peak memory) and take turns on the same rows, the
same number of optimizer steps and the same threads. A ratio is taken within a round. Results go to results.json beside
this file.

To add a measurement, append a function to `SECTIONS`: it takes the options and returns what results.json is to hold.
"""

import argparse
import json
import math
import platform
import tempfile
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from torch.utils.benchmark import Timer
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from alpaca_helpers.batches import PadToLongest
from alpaca_helpers.data import IGNORED
from alpaca_helpers.lora import lora_config
from alpaca_helpers.models import base_dtype, best_device
from alpaca_helpers.prompts import format_prompt
from alpaca_helpers.run import Run
from alpaca_helpers.series import run_series
from alpaca_helpers.training import AnswerTrainer
from dev.gpu import gradients, graphs

from . import chat, evaluation, generation
from .shared import (
    REAL,
    SHAPES,
    common,
    in_turns,
    load_data,
    load_model,
    peak_memory,
    spread,
    timed_training,
    tokenized,
)

RESULTS = Path(__file__).with_name("results.json")
STEPS = {"pocket": 60, "gpt2": 8, "gpt2-medium": 24}
HELDOUT = 32  # rows for a contender's loss


# Who trains. A contender takes a model's name, rows, their tokenizer, and a function that returns training arguments;
# it returns its trainer.


def pad(example: dict, tokenizer) -> dict:
    """Tokenize as the document does: no input, no end of text, a row of 128 tokens."""
    text = f"{format_prompt(example['instruction'])} {example['output']}"
    encoded = tokenizer(text, truncation=True, max_length=128, padding="max_length")
    encoded["labels"] = encoded["input_ids"].copy()
    return encoded


def transformers_own(name: str, rows: Dataset, collator: Callable, arguments: Callable) -> Trainer:
    """Return transformers' Trainer on tokenized rows, 8 at once as the document has it: all logits."""
    return Trainer(
        model=get_peft_model(load_model(name), lora_config()),
        args=TrainingArguments(**arguments(8), fp16=torch.cuda.is_available()),
        train_dataset=rows,
        data_collator=collator,
    )


def document(name: str, rows: Dataset, tokenizer, arguments: Callable) -> Trainer:
    """The document's Trainer: rows padded to 128 tokens, a loss on all of them."""
    padded = rows.map(pad, fn_kwargs={"tokenizer": tokenizer}, remove_columns=rows.column_names)
    return transformers_own(name, padded, DataCollatorForLanguageModeling(tokenizer, mlm=False), arguments)


def plain(name: str, rows: Dataset, tokenizer, arguments: Callable) -> Trainer:
    """Our recipe in transformers' own Trainer: random batches padded to their longest row."""
    data = tokenized(rows, tokenizer)
    return transformers_own(name, data, DataCollatorForSeq2Seq(tokenizer, padding=True), arguments)


def trl(name: str, rows: Dataset, tokenizer, arguments: Callable, packing: bool = False) -> Trainer:
    """TRL's SFTTrainer with a loss on the completion only, at its best settings."""
    from trl import SFTConfig, SFTTrainer

    data = tokenized(rows, tokenizer)
    data = data.map(
        lambda row: {"completion_mask": [int(label != IGNORED) for label in row["labels"]]}, remove_columns="labels"
    )
    bf16, cuda = base_dtype() == torch.bfloat16, torch.cuda.is_available()
    # all logits of more than 8 rows take longer on a CPU: 58 s instead of 33 for GPT-2's eight steps
    chosen = arguments(None if cuda else 8) | {"packing": packing, "max_length": 128}
    if packing:  # fewer, fuller rows: spread over the same number of optimizer steps
        filled = sum(map(len, data["input_ids"])) / 128 / len(data)
        chosen["per_device_train_batch_size"] = math.ceil(filled * chosen["per_device_train_batch_size"])
    else:
        chosen["train_sampling_strategy"] = "group_by_length"
    model = get_peft_model(load_model(name, base_dtype()), lora_config())
    if bf16 and not cuda:
        model.set_attn_implementation("eager")  # as ours has it
    options = {"completion_only_loss": True, "gradient_checkpointing": False}
    config = SFTConfig(**chosen, **options, bf16=bf16, fp16=cuda and not bf16, use_cpu=not cuda)
    return SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)


def ours(
    name: str, rows: Dataset, tokenizer, arguments: Callable, trainer: type = AnswerTrainer, fp16: bool = False
) -> Trainer:
    """The series' trainer as notebook 03 makes it, or another in its place.

    Args:
        fp16: hold the base in float32 and compute in float16, as on a GPU without bfloat16.
    """
    return trainer(
        model=get_peft_model(load_model(name, torch.float32 if fp16 else base_dtype()), lora_config()),
        args=TrainingArguments(**arguments(), fp16=fp16),
        train_dataset=tokenized(rows, tokenizer),
        data_collator=PadToLongest(tokenizer.pad_token_id),
    )


CONTENDERS = {
    "document": document,
    "plain answers": plain,
    "TRL": trl,
    "TRL packed": partial(trl, packing=True),
    "ours": ours,
}
EVERYWHERE = list(CONTENDERS)  # those after them are for a GPU
CONTENDERS["ours, float16"] = partial(ours, fp16=True)
CONTENDERS |= {name: partial(ours, trainer=trainer) for name, trainer in graphs.TRAINERS.items()}


def train(contender: str, name: str, batch_size: int, steps: int) -> dict[str, float]:
    """Train in the process of a contender; return seconds, held-out loss and peak memory."""
    disable_progress_bars()
    warm_up = steps if torch.cuda.is_available() else 0  # a GPU's kernels are chosen and its memory taken bit by bit
    rows, tokenizer = load_data(name)
    count = min(batch_size * steps, len(rows) - HELDOUT)
    mine, heldout = rows.select(range(count)), rows.select(range(count, count + HELDOUT))
    with tempfile.TemporaryDirectory() as folder:
        set_seed(0)
        arguments = partial(common, name, batch_size, folder, warm_up + steps)
        trainer = CONTENDERS[contender](name, mine, tokenizer, arguments)
        seconds, worked = timed_training(trainer, warm_up)
    trained = batch_size * steps
    loss = heldout_loss(trainer.model, tokenized(heldout, tokenizer))
    work = needed_work(trainer.model, tokenized(mine, tokenizer)) * trained / count
    print(f"  {name}: {contender} {seconds:.1f} s, {worked:.1f} s of processor time", flush=True)
    run = {"seconds": seconds, "cpu": worked, "rows": trained, "loss": loss, "gflops": work / seconds / 1e9}
    return run | {"peak_gb": peak_memory()}


def needed_work(model, rows: Dataset) -> float:
    """Return the floating-point operations of one pass that nobody is spared: 4 a parameter and token (the frozen base
    takes no gradients of its weights), in the layers for every token, in the output layer for the learned ones.
    """
    sizes = {name: value.numel() for name, value in model.named_parameters() if "lora_" not in name}
    layers = sum(size for name, size in sizes.items() if ".h." in name)
    head = next(size for name, size in sizes.items() if name.endswith("wte.weight"))
    tokens = sum(map(len, rows["input_ids"]))
    learned = sum(label != IGNORED for labels in rows["labels"] for label in labels)
    return 4.0 * (layers * tokens + head * learned)


def heldout_loss(model, rows: Dataset) -> float:
    """Return the mean cross entropy an answer token, by the model's own plain loss, row by row."""
    model.eval()
    total, tokens = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "labels"))
        learned = int((labels[:, 1:] != IGNORED).sum())
        with torch.inference_mode():
            total += model(input_ids=ids, labels=labels).loss.item() * learned
        tokens += learned
    return total / tokens


# What is measured.


def train_speed(options: argparse.Namespace) -> dict:
    """Rows a second, peak memory and held-out loss of each contender, on each model."""
    return {
        name if size == 16 else f"{name}, {size} rows a step": race(name, size, options)
        for name in options.models
        for size in options.batch_sizes
    }


def race(name: str, batch_size: int, options: argparse.Namespace) -> dict:
    steps = options.steps or max(8, STEPS[name] * 16 // batch_size)
    contenders = [each for each in options.contenders if not each.startswith("TRL") or find_spec("trl")]
    with ExitStack() as stack:

        def in_its_process(contender: str) -> Callable[[], dict]:
            pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            return lambda: pool.submit(train, contender, name, batch_size, steps).result()

        runs = in_turns({contender: in_its_process(contender) for contender in contenders}, options.rounds)
    return {"steps": steps, **{contender: summary(runs, contender) for contender in contenders}}


def summary(runs: dict[str, list[dict]], contender: str) -> dict:
    mine = runs[contender]
    ratios = {
        f"times_{other}": spread([theirs["seconds"] / run["seconds"] for theirs, run in zip(runs[other], mine)])
        for other in runs
        if other != contender
    }
    return {
        "rows_per_second": spread([run["rows"] / run["seconds"] for run in mine]),
        "gflops": spread([run["gflops"] for run in mine]),
        "cpu_seconds": spread([run["cpu"] for run in mine]),  # less than the clock's where others use the machine too
        "peak_gb": max(run["peak_gb"] for run in mine),
        "heldout_loss": mine[-1]["loss"],
        **ratios,
    }


def matrix_rate(options: argparse.Namespace) -> dict:
    """The machine's own rate of a product, in GFLOP/s: on a CPU one as large as GPT-2's largest, on a GPU one that
    fills it.
    """
    dtype, device = base_dtype(), best_device()
    rows, inner, columns = (8192, 8192, 8192) if device == "cuda" else (1024, 768, 3072)
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    seconds = timer.blocked_autorange(min_run_time=1).times
    return {"dtype": str(dtype), "gflops": spread([2 * rows * inner * columns / each / 1e9 for each in seconds])}


def tokenize_speed(options: argparse.Namespace) -> dict:
    """Rows a second: the document's map, row by row and padded, against ours in batches."""
    rows, tokenizer = load_data("gpt2")
    rows = Dataset.from_dict({name: list(rows[name]) * (1 + 4000 // len(rows)) for name in rows.column_names})
    given = {"fn_kwargs": {"tokenizer": tokenizer}, "remove_columns": rows.column_names}
    ways = {
        "document": lambda: rows.map(pad, **given, load_from_cache_file=False),
        "ours": lambda: tokenized(rows, tokenizer, load_from_cache_file=False),
    }
    seconds = in_turns({way: partial(timeit.timeit, run, number=1) for way, run in ways.items()}, options.rounds)
    return {
        "rows": len(rows),
        **{f"{way}_rows_per_second": spread([len(rows) / s for s in seconds[way]]) for way in ways},
        "ours_times_document": spread([a / b for a, b in zip(seconds["document"], seconds["ours"])]),
    }


def evaluation_speed(options: argparse.Namespace) -> dict:
    """Held-out rows answered in batches against the document's way, on a finished run of the pocket."""
    run = Run.named("pocket")
    if not (run.folder / "adapter").exists():
        run_series({"profile": "pocket", "run": "pocket"})
    return evaluation.measure(run, rows=200 if options.rounds > 1 else 8)


def chat_speed(options: argparse.Namespace) -> dict:
    """What the chat box makes one wait."""
    return chat.measure(rounds=15 if options.rounds > 1 else 2)


def generation_speed(options: argparse.Namespace) -> list:
    """Answers of base and tuned by how many are decoded together, on the last of the models."""
    prompts, sizes, tokens = (300, [64, 128, 300], 80) if options.rounds > 1 else (4, [2, 4], 4)
    return generation.measure(options.models[-1], prompts, sizes, tokens)


def gradient_differences(options: argparse.Namespace) -> dict:
    """Whether the contenders for a GPU compute what ours does, on the last of the models."""
    rows, tokenizer = load_data(options.models[-1])
    data = tokenized(rows.select(range(16)), tokenizer)
    return gradients.measure(options.models[-1], data, tokenizer.pad_token_id)


SECTIONS = {
    "training": train_speed,
    "tokenizing": tokenize_speed,
    "matrix_product": matrix_rate,
    "evaluation": evaluation_speed,
    "chat": chat_speed,
}
USUAL = list(SECTIONS)  # those after them are for a GPU
SECTIONS |= {"generation": generation_speed, "gradients": gradient_differences}


def machine() -> dict:
    packages = ("torch", "transformers", "peft", "datasets", "accelerate", "trl")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) if find_spec(name) else None for name in packages},
        "rows": "real" if REAL.is_dir() else "pocket",
    }


def show(results: dict) -> None:
    """Print the results, a race as a table: minimum, median and maximum of the rounds."""

    def text(value: object) -> str:
        if isinstance(value, dict) and "median" in value:
            return "{min:.3g} / {median:.3g} / {max:.3g}".format(**value)
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    print("\nEach as minimum / median / maximum of the rounds; times: how often as fast, within a round.")
    for name, race in results.pop("training", {}).items():
        table = pd.DataFrame({contender: row for contender, row in race.items() if contender != "steps"})
        lines = ["rows_per_second", "times_document", "times_TRL", "times_TRL packed", "peak_gb", "heldout_loss"]
        table = table.loc[[line for line in lines if line in table.index]]
        print(f"\n{name}, {race['steps']} steps\n{table.fillna('').map(text).to_string()}")
    for section, values in results.items():
        shown = values.items() if isinstance(values, dict) else enumerate(values)
        print(f"\n{section}: " + ", ".join(f"{name} {text(value)}" for name, value in shown))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure speed and memory; about a quarter of an hour on two cores.")
    models, sizes = ["pocket", "gpt2"], [16]
    if torch.cuda.is_available():
        models, sizes = [*models, "gpt2-medium"], [16, 128, 256]
    parser.add_argument("--models", nargs="+", default=models, choices=["pocket", *SHAPES], help=f"({models})")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=sizes, help=f"rows a step ({sizes})")
    parser.add_argument(
        "--contenders", nargs="+", default=EVERYWHERE, choices=list(CONTENDERS), help=f"({', '.join(EVERYWHERE)})"
    )
    parser.add_argument("--sections", nargs="+", default=USUAL, choices=list(SECTIONS), help=f"({', '.join(USUAL)})")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (3)")
    parser.add_argument("--steps", type=int, help="optimizer steps a turn (pocket 60, GPT-2 8)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to write (results.json beside this one)")
    options = parser.parse_args()
    disable_progress_bars()
    results = {"machine": machine()}
    for section in options.sections:
        print(f"{section} …", flush=True)
        results[section] = SECTIONS[section](options)
    if {"training", "matrix_product"} <= results.keys():
        for name, race in results["training"].items():
            if "ours" in race:
                reached, rate = race["ours"]["gflops"]["median"], results["matrix_product"]["gflops"]["median"]
                results["matrix_product"][f"share that ours reaches on {name}"] = reached / rate
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
