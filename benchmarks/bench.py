"""Speed and memory of what the series does: `python -m benchmarks.bench --help`.

Contenders live in processes of their own (so that each has its own peak memory) and take turns on the same rows, the
same number of optimizer steps and the same threads: what disturbs the machine disturbs them all. A ratio is taken
within a round. Results go to results.json beside this file.

To add a measurement, append a function to `SECTIONS`: it takes the options and returns what results.json is to hold.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel, get_peft_model
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from alpaca_helpers import pocket
from alpaca_helpers.batches import PadToLongest
from alpaca_helpers.config import PROFILES
from alpaca_helpers.data import IGNORED, tokenize
from alpaca_helpers.lora import lora_config
from alpaca_helpers.models import base_dtype, best_device, load_base, load_tokenizer
from alpaca_helpers.prompts import format_prompt
from alpaca_helpers.rows import load_rows
from alpaca_helpers.run import Run
from alpaca_helpers.series import run_series
from alpaca_helpers.training import AnswerTrainer
from alpaca_lessons.dataset import drop_reason
from benchmarks import chat, evaluation
from dev.gpu import graphs

RESULTS = Path(__file__).with_name("results.json")
PROJECT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("ALPACA_TEST_DATA", PROJECT.parent / "shared" / "data"))  # real rows and vocabulary
SHAPES = {"gpt2": {}, "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16}}
STEPS = {"pocket": 60, "gpt2": 8, "gpt2-medium": 24}


# What is trained: the same model and rows for every contender.


@dataclass(frozen=True)
class Settings:
    """What all contenders train with."""

    learning_rate: float
    batch_size: int
    seed: int = 0


def load_model(name: str, dtype: torch.dtype) -> GPT2LMHeadModel:
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


def tokenized(rows: Dataset, tokenizer, recipe: str) -> Dataset:
    options = {"tokenizer": tokenizer, "recipe": recipe}
    return rows.map(tokenize, batched=True, fn_kwargs=options, remove_columns=rows.column_names)


# Who trains it. A contender returns its trainer, ready for `steps` optimizer steps over the rows.


def common(settings: Settings, folder: str, steps: int, at_once: int = 8) -> dict:
    """The training arguments that all share, but for the rows at once: the document's 8, or what suits best. Nothing
    is saved, evaluated or logged on the way.
    """
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": settings.batch_size // at_once,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": settings.seed,
    }


def document(name: str, rows: Dataset, tokenizer, settings: Settings, folder: str, steps: int) -> Trainer:
    """The document's Trainer: rows padded to 128 tokens, a loss on all of them, all logits."""

    def pad(example):  # as the document has it: its own template, no input, no end of text
        text = f"Instruction: {example['instruction']}\nRéponse: {example['output']}"
        encoded = tokenizer(text, truncation=True, max_length=128, padding="max_length")
        encoded["labels"] = encoded["input_ids"].copy()
        return encoded

    return Trainer(
        model=get_peft_model(load_model(name, torch.float32), lora_config()),
        args=TrainingArguments(**common(settings, folder, steps), fp16=torch.cuda.is_available()),
        train_dataset=rows.map(pad, remove_columns=rows.column_names),
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False),
    )


def plain(name: str, rows: Dataset, tokenizer, settings: Settings, folder: str, steps: int) -> Trainer:
    """Our recipe in transformers' own Trainer: random batches padded to their longest row, all logits."""
    return Trainer(
        model=get_peft_model(load_model(name, torch.float32), lora_config()),
        args=TrainingArguments(**common(settings, folder, steps), fp16=torch.cuda.is_available()),
        train_dataset=tokenized(rows, tokenizer, "answers"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )


def trl(name: str, rows: Dataset, tokenizer, settings: Settings, folder: str, steps: int, packing=False) -> Trainer:
    """TRL's SFTTrainer with a loss on the completion only, at its best settings."""
    from trl import SFTConfig, SFTTrainer

    data = tokenized(rows, tokenizer, "answers")
    data = data.map(
        lambda row: {"completion_mask": [int(label != IGNORED) for label in row["labels"]]}, remove_columns="labels"
    )
    bf16 = base_dtype() == torch.bfloat16
    # all logits of more than 8 rows take longer on a CPU: 58 s instead of 33 for GPT-2's eight steps
    at_once = settings.batch_size if torch.cuda.is_available() else 8
    arguments = common(settings, folder, steps, at_once) | {"packing": packing, "max_length": 128}
    if packing:  # fewer, fuller rows: spread over the same number of optimizer steps
        full = sum(map(len, data["input_ids"])) / 128 / len(data) * settings.batch_size
        arguments["per_device_train_batch_size"] = math.ceil(full / arguments["gradient_accumulation_steps"])
    else:
        arguments["train_sampling_strategy"] = "group_by_length"
    model = get_peft_model(load_model(name, base_dtype()), lora_config())
    if bf16 and model.device.type == "cpu":
        model.set_attn_implementation("eager")  # as ours has it
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            **arguments,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            fp16=torch.cuda.is_available() and not bf16,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )


def trl_packed(*arguments) -> Trainer:
    return trl(*arguments, packing=True)


def ours(
    name: str, rows: Dataset, tokenizer, settings: Settings, folder: str, steps: int, trainer=AnswerTrainer, fp16=False
) -> Trainer:
    """The series' trainer as notebook 03 makes it, or another in its place.

    Args:
        fp16: hold the base in float32 and compute in float16, as on a GPU without bfloat16.
    """
    data = tokenized(rows, tokenizer, "answers")
    return trainer(
        model=get_peft_model(load_model(name, torch.float32 if fp16 else base_dtype()), lora_config()),
        args=TrainingArguments(**common(settings, folder, steps, settings.batch_size), fp16=fp16),
        train_dataset=data,
        data_collator=PadToLongest(tokenizer.pad_token_id),
    )


CONTENDERS = {"document": document, "plain answers": plain, "TRL": trl, "TRL packed": trl_packed, "ours": ours}
EVERYWHERE = list(CONTENDERS)  # those after them are for a GPU
CONTENDERS["ours, float16"] = partial(ours, fp16=True)
CONTENDERS |= {name: partial(ours, trainer=trainer) for name, trainer in graphs.TRAINERS.items()}


def compete(contender: str, name: str, options: dict, pipe) -> None:
    """Train when told to, in a process of its own; answer seconds, held-out loss and peak memory."""
    disable_progress_bars()
    torch.set_num_threads(options["threads"])
    settings, steps = options["settings"], options["steps"]
    warm_up = steps if torch.cuda.is_available() else 0  # a GPU's kernels are chosen and its memory taken bit by bit
    rows, tokenizer = load_data(name)
    count = min(settings.batch_size * steps, len(rows) - options["heldout"])
    train, heldout = rows.select(range(count)), rows.select(range(count, count + options["heldout"]))
    while pipe.recv():
        with tempfile.TemporaryDirectory() as folder:
            set_seed(settings.seed)
            trainer = CONTENDERS[contender](name, train, tokenizer, settings, folder, warm_up + steps)
            watch = Stopwatch(warm_up)
            trainer.add_callback(watch)
            trainer.train()
            seconds, worked = watch.stop()
        trained = settings.batch_size * steps
        loss = heldout_loss(trainer.model, tokenized(heldout, tokenizer, "answers"))
        work = needed_work(trainer.model, tokenized(train, tokenizer, "answers")) * trained / len(train)
        run = {"seconds": seconds, "cpu": worked, "rows": trained, "loss": loss, "gflops": work / seconds / 1e9}
        pipe.send(run | {"peak_gb": peak_memory()})
        del trainer


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

    def stop(self) -> tuple[float, float]:
        """Return the seconds passed, by the clock and of processor time."""
        return tuple(now - then for now, then in zip(self.now(), self.begun))


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


def peak_memory() -> float:
    """Return this process's peak memory in GB: the GPU's where there is one, else all that is resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    kilo = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9


# What is measured.


def train_speed(options: argparse.Namespace) -> dict:
    """Rows a second, peak memory and held-out loss of each contender, on each model."""
    return {
        name if size == 16 else f"{name}, {size} rows a step": race(name, size, options)
        for name in options.models
        for size in options.batch_sizes
    }


def race(name: str, batch_size: int, options: argparse.Namespace) -> dict:
    settings = Settings(PROFILES["pocket" if name == "pocket" else "gpt2-medium"].learning_rate, batch_size)
    steps = options.steps or max(8, STEPS[name] * 16 // batch_size)
    shared = {"settings": settings, "steps": steps, "heldout": 32, "threads": options.threads}
    contenders = [c for c in options.contenders if not c.startswith("TRL") or installed("trl")]
    context, runs = multiprocessing.get_context("spawn"), {contender: [] for contender in contenders}
    pipes, processes = {}, []
    for contender in contenders:
        pipes[contender], end = context.Pipe()
        processes.append(context.Process(target=compete, args=(contender, name, shared, end), daemon=True))
        processes[-1].start()
        end.close()
    for number in range(options.rounds):
        for contender, pipe in pipes.items():
            pipe.send(True)
            try:
                runs[contender].append(pipe.recv())
            except (EOFError, ConnectionResetError):
                raise SystemExit(f"{contender} on {name} failed: its error is printed above.") from None
            took = "{seconds:.1f} s, {cpu:.1f} s of processor time".format(**runs[contender][-1])
            print(f"  {name}, round {number + 1} of {options.rounds}: {contender} {took}", flush=True)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return {"steps": steps, **{contender: summary(runs, contender) for contender in contenders}}


def summary(runs: dict[str, list[dict]], contender: str) -> dict:
    mine = runs[contender]
    speeds = [run["rows"] / run["seconds"] for run in mine]
    ratios = {
        f"times_{other}": spread([theirs["seconds"] / run["seconds"] for theirs, run in zip(runs[other], mine)])
        for other in runs
        if other != contender
    }
    return {
        "rows_per_second": spread(speeds),
        "gflops": spread([run["gflops"] for run in mine]),
        "cpu_seconds": spread([run["cpu"] for run in mine]),  # less than the clock's where others use the machine too
        "peak_gb": max(run["peak_gb"] for run in mine),
        "heldout_loss": mine[-1]["loss"],
        **ratios,
    }


def matrix_rate(options: argparse.Namespace) -> dict:
    """The machine's own rate of a product, in GFLOP/s, and the share that we reach: on a CPU one as large as GPT-2's
    largest, on a GPU one that fills it.
    """
    dtype, device = base_dtype(), best_device()
    rows, inner, columns = (8192, 8192, 8192) if device == "cuda" else (1024, 768, 3072)
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    rates = []
    for _ in range(30):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * rows * inner * columns / (time.perf_counter() - start) / 1e9)
    return {"dtype": str(dtype), "gflops": spread(rates[5:])}


def tokenize_speed(options: argparse.Namespace) -> dict:
    """Rows a second: the document's map, row by row and padded, against ours in batches."""
    rows, tokenizer = load_data("gpt2")
    rows = Dataset.from_dict({name: list(rows[name]) * (1 + 4000 // len(rows)) for name in rows.column_names})

    def row_by_row(example):
        text = format_prompt(example["instruction"]) + " " + example["output"]
        encoded = tokenizer(text, truncation=True, max_length=128, padding="max_length")
        encoded["labels"] = encoded["input_ids"].copy()
        return encoded

    ways: dict[str, Callable] = {
        "document": lambda: rows.map(row_by_row, remove_columns=rows.column_names, load_from_cache_file=False),
        "ours": lambda: rows.map(
            tokenize,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=rows.column_names,
            load_from_cache_file=False,
        ),
    }
    seconds = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    return {
        "rows": len(rows),
        **{f"{way}_rows_per_second": spread([len(rows) / s for s in seconds[way]]) for way in ways},
        "ours_times_document": spread([a / b for a, b in zip(seconds["document"], seconds["ours"])]),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def evaluation_speed(options: argparse.Namespace) -> dict:
    """Held-out rows answered in batches against the document's way, on a finished run of the pocket."""
    if not (Run.named("pocket").folder / "adapter").exists():
        run_series({"profile": "pocket", "run": "pocket"})
    return evaluation.measure("pocket", rows=200 if options.rounds > 1 else 8)


def chat_speed(options: argparse.Namespace) -> dict:
    """What the chat box makes one wait."""
    return {f"{row['what']} ({row['unit']})": row["value"] for row in chat.measure(15 if options.rounds > 1 else 2)}


SECTIONS = {
    "training": train_speed,
    "tokenizing": tokenize_speed,
    "matrix_product": matrix_rate,
    "evaluation": evaluation_speed,
    "chat": chat_speed,
}


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def machine(options: argparse.Namespace) -> dict:
    packages = ("torch", "transformers", "peft", "datasets", "accelerate", "trl")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": options.threads,
        "python": platform.python_version(),
        **{name: version(name) if installed(name) else None for name in packages},
        "rows": "real" if REAL.is_dir() else "pocket",
    }


def show(results: dict) -> None:
    """Print the results as tables: minimum, median and maximum of the rounds."""

    def text(values: dict | float) -> str:
        return "{min:.3g} / {median:.3g} / {max:.3g}".format(**values) if isinstance(values, dict) else f"{values:.3g}"

    print("\nEach as minimum / median / maximum of the rounds; times: how often as fast, within a round.")
    for name, race in results.get("training", {}).items():
        print(f"\n{name}, {race['steps']} steps")
        print(f"  {'':14} {'rows/s':>24} {'times document':>24} {'GB':>6} {'held-out':>9}")
        for contender, row in race.items():
            if isinstance(row, dict):
                times = text(row.get("times_document", 1.0))
                speed = text(row["rows_per_second"])
                print(f"  {contender:14} {speed:>24} {times:>24} {row['peak_gb']:6.2f} {row['heldout_loss']:9.4f}")
        for other in ("TRL", "TRL packed"):
            if {other, "ours"} <= race.keys():
                print(f"  ours is {text(race['ours'][f'times_{other}'])} times as fast as {other}")
    for section, values in results.items():
        if section not in ("training", "machine"):
            print(
                f"\n{section}: " + ", ".join(f"{k} {text(v) if isinstance(v, dict) else v}" for k, v in values.items())
            )
    print("\n" + ", ".join(f"{name} {value}" for name, value in results["machine"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed and memory; about a quarter of an hour on two cores.")
    models = ["pocket", "gpt2"] + ["gpt2-medium"] * torch.cuda.is_available()
    parser.add_argument(
        "--models", nargs="+", default=models, choices=["pocket", *SHAPES], help=f"({' '.join(models)})"
    )
    sizes = [16] if not torch.cuda.is_available() else [16, 128, 256]
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=sizes, help=f"rows a step ({' '.join(map(str, sizes))})"
    )
    parser.add_argument(
        "--contenders", nargs="+", default=EVERYWHERE, choices=list(CONTENDERS), help=f"({', '.join(EVERYWHERE)})"
    )
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), help="(all)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (3)")
    parser.add_argument("--steps", type=int, help="optimizer steps a turn (pocket 60, GPT-2 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(torch's own choice)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (results.json beside this one)")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that all works")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 1, 1
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    results = {"machine": machine(options)}
    for section in options.sections:
        print(f"{section} …", flush=True)
        results[section] = SECTIONS[section](options)
    if {"training", "matrix_product"} <= results.keys():
        for name, race in results["training"].items():
            if "ours" not in race:
                continue
            reached, rate = race["ours"]["gflops"]["median"], results["matrix_product"]["gflops"]["median"]
            results["matrix_product"][f"share that ours reaches on {name}"] = reached / rate
    options.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)
    print(f"Written to {options.results}")


if __name__ == "__main__":
    main()
