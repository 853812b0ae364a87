"""Whether what `graphs.py` tries computes what AnswerTrainer computes: `python -m dev.gpu.gradients --help`."""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainingArguments, set_seed

from alpaca_helpers.batches import PadToLongest
from alpaca_helpers.lora import lora_in_base_precision
from alpaca_helpers.training import AnswerTrainer
from benchmarks import bench

from .graphs import TRAINERS


def make(kind: type[AnswerTrainer], name: str, rows: Dataset, pad: int, dropout: float = 0.0) -> tuple:
    """Return a trainer of that kind on one batch, `rows`, and the batch as it makes it."""
    set_seed(0)
    args = TrainingArguments(output_dir="build", per_device_train_batch_size=len(rows), report_to=[], max_steps=1)
    model = bench.load_tuned(name, lora_dropout=dropout).train()
    trainer = kind(model=model, args=args, train_dataset=rows, data_collator=PadToLongest(pad))
    return trainer, trainer._prepare_inputs(trainer.data_collator(list(rows)))


def usual(make) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return AnswerTrainer's loss and gradients."""
    trainer, batch = make(AnswerTrainer)
    with lora_in_base_precision(trainer.model):
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=trainer.labels_per_batch)
        loss.backward()
    return loss.detach(), [value.grad for value in trainer.model.parameters() if value.requires_grad]


def differences(kind: type[AnswerTrainer], make) -> dict[str, float]:
    """Return how far its loss and gradients are from the usual ones, relative, and whether its dropout is random."""
    (loss, gradients), (trainer, batch), (dropped, same_batch) = usual(make), make(kind), make(kind, dropout=0.5)
    with lora_in_base_precision(trainer.model), lora_in_base_precision(dropped.model):
        trainer.gradients(**batch)  # the first call captures, the second replays
        its_loss, *its = trainer.gradients(**batch)
        losses = [dropped.gradients(**same_batch)[0].item() for _ in range(4)]
    wanted, its = (torch.cat([value.flatten().double() for value in values]) for values in (gradients, its))
    return {
        "loss": ((its_loss - loss).abs() / loss).item(),
        "gradients": ((its - wanted).norm() / wanted.norm()).item(),
        "different losses of four under dropout": len(set(losses)),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m dev.gpu.gradients", description=__doc__)
    parser.add_argument("--model", default="gpt2-medium", choices=["pocket", *bench.SHAPES])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows, tokenizer = bench.load_data(options.model)
    data = bench.tokenized(rows.select(range(options.rows)), tokenizer, "answers")
    results = {}
    for name, kind in TRAINERS.items():
        try:
            found = differences(kind, partial(make, name=options.model, rows=data, pad=tokenizer.pad_token_id))
        except Exception as error:  # whatever a library raises: the others are still tried
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(name, found, flush=True)
        results[name] = found
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
