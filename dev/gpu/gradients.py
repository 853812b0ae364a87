"""Whether what `graphs.py` tries computes what AnswerTrainer computes: the section `gradients` of benchmarks.bench."""

from functools import partial

import torch
from datasets import Dataset
from transformers import TrainingArguments, set_seed

from alpaca_helpers.batches import PadToLongest
from alpaca_helpers.lora import lora_in_base_precision
from alpaca_helpers.training import AnswerTrainer
from benchmarks.shared import load_tuned

from .graphs import TRAINERS


def make(kind: type[AnswerTrainer], name: str, rows: Dataset, pad: int, dropout: float = 0.0) -> tuple:
    """Return a trainer of that kind on one batch, `rows`, and the batch as it makes it."""
    set_seed(0)
    args = TrainingArguments(output_dir="build", per_device_train_batch_size=len(rows), report_to=[], max_steps=1)
    model = load_tuned(name, lora_dropout=dropout).train()
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


def measure(name: str, rows: Dataset, pad: int) -> dict[str, dict]:
    """Return the `differences` of each kind on one batch of tokenized rows, or why it failed; `pad` is a token id."""
    results = {}
    for kind, trainer in TRAINERS.items():
        try:
            found = differences(trainer, partial(make, name=name, rows=rows, pad=pad))
        except Exception as error:  # whatever a library raises: the others are still tried
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(kind, found, flush=True)
        results[kind] = found
    return results
