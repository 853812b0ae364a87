"""What each speed patch of training is worth: `python -m benchmarks.speedups`.

A few steps of Trainer's own loop with all patches, and with all but one, in turns; the figure is how many times as
long a step takes without it, in each round. Three models: GPT-2's width in four layers with random weights, one of 24
layers of width 16, whose step is overhead alone, as a small batch is on a GPU, and the pocket.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from alpaca_helpers import pocket, speedups
from alpaca_helpers.batches import PadToLongest
from alpaca_helpers.data import tokenize
from alpaca_helpers.lora import lora_config
from alpaca_helpers.models import base_dtype, best_device, load_base, load_tokenizer
from alpaca_helpers.training import AnswerTrainer
from benchmarks import bench

SHAPES = {
    "GPT-2's width, 4 layers": {"n_layer": 4, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "24 layers of width 16": {"n_layer": 24, "n_embd": 16, "n_head": 2, "vocab_size": 2048},
    "pocket": None,
}
FOR_A_GPU = {"gpt2-medium": bench.SHAPES["gpt2-medium"]}


def seconds_per_step(shape: dict | None, rows: Dataset, steps: int, batch_size: int) -> float:
    """Return what a step takes, loading and the first steps left out."""
    torch.manual_seed(0)
    base = load_base(str(pocket.MODEL), dtype=base_dtype())
    if shape:
        base = GPT2LMHeadModel(GPT2Config(**shape)).to(best_device(), base_dtype())
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
        trainer = AnswerTrainer(
            model=get_peft_model(base, lora_config()), args=args, train_dataset=rows, data_collator=PadToLongest(0)
        )
        times: list[float] = []
        loss = trainer.compute_loss

        def timed(*given, **named):
            times.append(time.perf_counter())
            return loss(*given, **named)

        trainer.compute_loss = timed  # type: ignore[method-assign]
        trainer.train()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (time.perf_counter() - times[steps // 4]) / (steps - steps // 4)


def main() -> None:
    """Print a line a model and patch, and write them all as JSON on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speedups", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", choices=[*SHAPES, *FOR_A_GPU], default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(str(pocket.MODEL))
    text = Dataset.from_json(str(pocket.TRAIN))
    rows = text.map(tokenize, batched=True, fn_kwargs={"tokenizer": tokenizer})
    patches, table, shapes = list(speedups.PATCHES), [], SHAPES | FOR_A_GPU
    for name in options.models:
        steps = options.steps * (1 if name.startswith("GPT") else 5)
        ratios: dict[str, list[float]] = {patch.__name__: [] for patch in patches} | {"all of them": []}
        for _ in range(options.rounds):
            base = seconds_per_step(shapes[name], rows, steps, options.batch_size)
            for left_out in [*patches, None]:
                speedups.PATCHES[:] = [patch for patch in patches if left_out and patch is not left_out]
                took = seconds_per_step(shapes[name], rows, steps, options.batch_size)
                ratios[left_out.__name__ if left_out else "all of them"].append(took / base)
                speedups.PATCHES[:] = patches
        for patch, values in ratios.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            table.append({"model": name, "without": patch, "ratios": values})
            print(f"{name:25} without {patch:25} {low:5.2f} / {middle:5.2f} / {high:5.2f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
