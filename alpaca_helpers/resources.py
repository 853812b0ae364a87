"""What a training takes: seconds, memory and disk, measured on the spot; one sentence where memory is too small."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import Trainer, TrainerState

from . import AlpacaError
from .hub import readable_size
from .speedups import lora_in_base_precision


def measure_step(trainer: Trainer) -> tuple[float, int, int]:
    """Return the seconds that a training step takes, the bytes in use at its peak, and the bytes there are for it.

    Forward and backward are run for real, on the longest rows for the memory and on rows of average length for the
    time. Weights, gradients and random state stay as they were. On a CPU the bytes are those of the whole process,
    Python and the libraries included. Raises AlpacaError if they do not fit.
    """
    args, model, rows = trainer.args, trainer.model, trainer.train_dataset
    cuda, training, process, peak = args.device.type == "cuda", model.training, psutil.Process(), 0
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    ids = rows.select_columns([name for name in ("input_ids", "attention_mask", "labels") if name in rows.column_names])
    out_of_memory = explained_out_of_memory(args.train_batch_size)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with torch.random.fork_rng(), out_of_memory, lora_in_base_precision(model.train()):
        for wanted in (lengths.max(), lengths.mean(), lengths.mean()):  # kernels are loaded before the last
            chosen = np.argsort(abs(lengths - wanted), kind="stable")[: args.train_batch_size]
            batch = trainer._prepare_inputs(trainer.data_collator(list(ids.select(chosen))))
            begun = time.perf_counter()
            with torch.autocast("cuda", torch.float16, enabled=args.fp16):
                loss = trainer.compute_loss(model, batch)
            peak = max(peak, process.memory_info().rss)  # all activations are held now
            loss.backward()
            if cuda:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - begun) * args.gradient_accumulation_steps
            model.zero_grad()
    model.train(training)
    if cuda:
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        return seconds, torch.cuda.max_memory_allocated(), free
    return seconds, peak, psutil.virtual_memory().available + process.memory_info().rss


def announce(trainer: Trainer, checkpoint: Path | None = None) -> None:
    """Print how long the training takes, from `checkpoint` on if there is one, and what memory and disk it needs."""
    args, steps = trainer.args, trainer.steps_in_all()
    if checkpoint:
        done = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
        if done == steps:
            return print(f"This training is finished, all {steps} steps of it: `resume = False` would start it over.")
        print(f"Going on after step {done} of {steps}.")
        steps -= done
    seconds, memory, there = measure_step(trainer)
    disk = readable_size(trainer.disk_bytes())
    minutes = f"{steps * seconds / 60:.1f} minutes"
    print(f"The training takes about {minutes} beside its evaluations: {steps} steps of {seconds:.2f} s")
    print(f"The training needs {readable_size(memory)} of {readable_size(there)} of memory, at most {disk} on disk")
    if memory > there:
        print(f"The training needs more memory than there is: {less_memory(args.train_batch_size)}")


@contextmanager
def explained_out_of_memory(rows: int) -> Iterator[None]:
    """Run out of memory inside the block with one sentence that says what to change, with `rows` in memory at once."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        what = f"Out of memory with {rows} row{'s' * (rows > 1)} at once: {less_memory(rows)}"
        raise AlpacaError(f"{what}, and training goes on from its last checkpoint.", "out-of-memory") from error


def less_memory(rows: int) -> str:
    """Return what to change so that a training that has `rows` in memory at once takes less of it."""
    if rows > 1:
        return f"set `micro_batch_size` to {rows // 2}; the batch and the result stay the same"
    return "take a smaller `max_length` or a smaller `model`, in another `run`"
