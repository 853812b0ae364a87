"""What a training takes: seconds, memory and disk, measured on the spot; one sentence where memory is too small."""

import math
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

    Forward and backward are run for real: on the longest rows for the memory, then on rows of average length for the
    time. Weights, gradients and random state stay as they were. On a CPU the bytes are those of the whole process,
    Python and the libraries included. Raises AlpacaError if they do not fit.
    """
    args, model, rows = trainer.args, trainer.model, trainer.train_dataset
    cuda, training, peaks = args.device.type == "cuda", model.training, []
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    text = [name for name in rows.column_names if name not in ("input_ids", "attention_mask", "labels")]
    out_of_memory = explained_out_of_memory(args.train_batch_size)
    with torch.random.fork_rng(), out_of_memory, lora_in_base_precision(model.train()):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for wanted in (lengths.max(), lengths.mean(), lengths.mean()):
            chosen = np.argsort(abs(lengths - wanted), kind="stable")[: args.train_batch_size]
            batch = trainer._prepare_inputs(trainer.data_collator(list(rows.select(chosen).remove_columns(text))))
            begun = time.perf_counter()
            with torch.autocast("cuda", torch.float16, enabled=args.fp16):
                loss = trainer.compute_loss(model, dict(batch))
            peaks.append(psutil.Process().memory_info().rss)  # all activations are held now
            loss.backward()
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begun  # in the end, of the last: kernels are loaded before
            model.zero_grad()
    model.train(training)
    peak, there = max(peaks), psutil.virtual_memory().available + psutil.Process().memory_info().rss
    if cuda:
        peak, there = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return seconds * args.gradient_accumulation_steps, peak, there


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
    evaluations = 0
    if args.eval_strategy == "steps":
        every = args.eval_steps if args.eval_steps >= 1 else math.ceil(args.eval_steps * trainer.steps_in_all())
        evaluations = math.ceil(steps / every)
    evaluated = evaluations * len(trainer.eval_dataset or ()) / trainer.batch_size  # at a third of a step's work
    minutes = (steps + evaluated / 3) * seconds / 60
    print(f"The training takes about {minutes:.1f} minutes: {steps} steps of {seconds:.2f} s, and the evaluations")
    disk = readable_size(trainer.disk_bytes())
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
