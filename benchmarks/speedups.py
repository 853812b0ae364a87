"""What each speed-up of a training step is worth: `python -m benchmarks.speedups`.

A few steps of Trainer's own loop with all parts, and with all but one, in turns; the figure is how many times as long
a step takes without it, in each round. Three models: GPT-2's width in four layers with random weights, one of 24
layers of width 16, whose step is overhead alone, as a small batch is on a GPU, and the pocket.
"""

import argparse
import json
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from alpaca_helpers import pocket, training
from alpaca_helpers.batches import PadToLongest
from alpaca_helpers.lora import lora_config
from alpaca_helpers.models import base_dtype, best_device, training_options

from . import shared

SHAPES = {
    "GPT-2's width, 4 layers": {"n_layer": 4, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "24 layers of width 16": {"n_layer": 24, "n_embd": 16, "n_head": 2, "vocab_size": 2048},
    "pocket": None,
}
FOR_A_GPU = {"gpt2-medium": shared.SHAPES["gpt2-medium"]}
# What each leaves out of `training_options` and `lora_in_base_precision`: all that has this in its name.
PARTS = {
    "no dropout in the base": "drop",
    "the activation in one operation": "activation_function",
    "attention step by step": "attn_implementation",
    "LoRA in the base's precision": "lora_in_base_precision",
    "all of them": "",
}


def seconds_per_step(model: Path, rows: Dataset, steps: int, batch_size: int, left_out: str | None = None) -> float:
    """Return what a step takes, loading and the first steps left out; `left_out` is one of the values of `PARTS`."""

    def left(name: str) -> bool:
        return left_out is None or left_out not in name

    set_seed(0)
    options = {name: value for name, value in training_options(model).items() if left(name)}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=base_dtype(), **options).to(best_device())
    name = "lora_in_base_precision"
    with (
        tempfile.TemporaryDirectory() as folder,
        nullcontext() if left(name) else mock.patch.object(training, name, nullcontext),
    ):
        trainer = training.AnswerTrainer(
            model=get_peft_model(base, lora_config()),
            args=TrainingArguments(**shared.common("pocket", batch_size, folder, steps)),
            train_dataset=rows,
            data_collator=PadToLongest(0),
        )
        seconds, _ = shared.timed_training(trainer, warm_up=steps // 4)
    return seconds / (steps - steps // 4)


def main() -> None:
    """Print a line a model and part, and write them all as JSON on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speedups", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES, *FOR_A_GPU], default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = shared.tokenized(*shared.load_data("pocket"))
    table, shapes = [], SHAPES | FOR_A_GPU
    for name in options.models:
        steps = options.steps * (1 if name.startswith("GPT") else 5)
        with tempfile.TemporaryDirectory() as folder:
            model = pocket.MODEL
            if shapes[name]:
                model = Path(folder)
                GPT2LMHeadModel(GPT2Config(**shapes[name])).save_pretrained(model)
            step = partial(seconds_per_step, model, rows, steps, options.batch_size)
            ways = {"": step} | {part: partial(step, left_out=left_out) for part, left_out in PARTS.items()}
            seconds = shared.in_turns(ways, options.rounds)
        for part in PARTS:
            ratios = [without / base for without, base in zip(seconds[part], seconds[""])]
            table.append({"model": name, "without": part, "ratios": ratios})
            shown = "{min:5.2f} / {median:5.2f} / {max:5.2f}".format(**shared.spread(ratios))
            print(f"{name:25} without {part:32} {shown}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
