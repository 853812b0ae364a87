"""What each speed-up of a training step is worth: `python -m benchmarks.speedups`.

A few steps of Trainer's own loop with all parts, and with all but one, in turns; the figure is how many times as long
a step takes without it, in each round. Three models: GPT-2's width in four layers with random weights, one of 24
layers of width 16, whose step is overhead alone, as a small batch is on a GPU, and the pocket.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainingArguments

from alpaca_helpers import pocket, training
from alpaca_helpers.batches import PadToLongest
from alpaca_helpers.data import tokenize
from alpaca_helpers.lora import lora_config
from alpaca_helpers.models import base_dtype, best_device, load_tokenizer, training_options
from benchmarks import bench

SHAPES = {
    "GPT-2's width, 4 layers": {"n_layer": 4, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "24 layers of width 16": {"n_layer": 24, "n_embd": 16, "n_head": 2, "vocab_size": 2048},
    "pocket": None,
}
FOR_A_GPU = {"gpt2-medium": bench.SHAPES["gpt2-medium"]}
PARTS = {  # what each leaves out of `training_options`
    "no dropout in the base": lambda name: "drop" in name,
    "the activation in one operation": lambda name: name == "activation_function",
    "attention step by step": lambda name: name == "attn_implementation",
    "LoRA in the base's precision": lambda name: False,
}
PARTS["all of them"] = lambda name: True


def seconds_per_step(folder: Path, rows: Dataset, steps: int, batch_size: int, left_out: str = "") -> float:
    """Return what a step takes, loading and the first steps left out; `left_out` is one of `PARTS`."""
    torch.manual_seed(0)
    options = {
        name: value for name, value in training_options(folder).items() if not (left_out and PARTS[left_out](name))
    }
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=base_dtype(), **options).to(best_device())
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    trainer = training.AnswerTrainer(
        model=get_peft_model(base, lora_config()), args=args, train_dataset=rows, data_collator=PadToLongest(0)
    )
    times: list[float] = []
    loss = trainer.compute_loss

    def timed(*given, **kwargs):
        times.append(time.perf_counter())
        return loss(*given, **kwargs)

    trainer.compute_loss = timed  # type: ignore[method-assign]
    usual = left_out in ("LoRA in the base's precision", "all of them")
    with mock.patch.object(training, "lora_in_base_precision", nullcontext) if usual else nullcontext():
        trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - times[steps // 4]) / (steps - steps // 4)


def main() -> None:
    """Print a line a model and part, and write them all as JSON on request."""
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
    table, shapes = [], SHAPES | FOR_A_GPU
    for name in options.models:
        steps = options.steps * (1 if name.startswith("GPT") else 5)
        ratios: dict[str, list[float]] = {part: [] for part in PARTS}
        with tempfile.TemporaryDirectory() as folder:
            shape = shapes[name]
            model = GPT2LMHeadModel(GPT2Config(**shape)) if shape else GPT2LMHeadModel.from_pretrained(pocket.MODEL)
            model.save_pretrained(folder)
            for _ in range(options.rounds):
                base = seconds_per_step(Path(folder), rows, steps, options.batch_size)
                for part, values in ratios.items():
                    values.append(seconds_per_step(Path(folder), rows, steps, options.batch_size, part) / base)
        for part, values in ratios.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            table.append({"model": name, "without": part, "ratios": values})
            print(f"{name:25} without {part:32} {low:5.2f} / {middle:5.2f} / {high:5.2f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
