"""The trainer of notebook 03, and `python -m alpaca_helpers.training --help` for training on several devices."""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from . import AlpacaError
from .batches import LengthGroups, add_learned
from .card import write_card
from .cells import NOTEBOOKS, refuse_dropped, run_cells
from .checkpoints import PART, finish_checkpoint, is_main_process, resume_point, training_record
from .config import add_parameters, parse_parameters
from .console import run_command
from .data import IGNORED
from .files import check_disk_space, content_hash
from .lora import adapter_folder, check_trained, lora_in_base_precision
from .models import check_weights
from .run import Run


class AnswerTrainer(Trainer):
    """A drop-in replacement for transformers' Trainer, with less wasted work and safer checkpoints.

    Overridden: the order of rows (`LengthGroups`), the loss (logits at learned labels only, each label with the same
    weight), the losses on show (nats per label), checkpoints (whole, with checksums), and `train`.
    """

    def __init__(self, args: TrainingArguments, data_collator: Callable, **kwargs):
        args._n_gpu = min(args.n_gpu, 1)  # one process uses one GPU; torchrun starts one for each
        rows, devices = len(kwargs["train_dataset"]), args.world_size
        self.batch_size = args.train_batch_size * args.gradient_accumulation_steps * devices
        if rows < self.batch_size:  # a batch is what there is; on several devices some rows come twice
            args.gradient_accumulation_steps = math.ceil(rows / devices / args.train_batch_size)
            args.per_device_train_batch_size = math.ceil(rows / devices / args.gradient_accumulation_steps)
            share = args.per_device_train_batch_size * args.gradient_accumulation_steps
            self.batch_size = rows if devices == 1 else share * devices
        cuda = args.device.type == "cuda"
        args.dataloader_pin_memory = args.accelerator_config.non_blocking = cuda  # Python goes on while rows are sent
        args.logging_nan_inf_filter = False  # NaN is shown as such, and no step waits to be looked at
        super().__init__(args=args, data_collator=partial(add_learned, data_collator), **kwargs)
        check_trained(self.model)
        self.model_accepts_loss_kwargs = True  # the loss is divided by what `get_batch_samples` says, by nothing else
        self.lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        self.steps_per_epoch = math.ceil(len(self.lengths) / self.batch_size)
        learned = sum(label != IGNORED for labels in self.train_dataset["labels"] for label in labels[1:])
        self.labels_per_batch = self.batch_size * learned / len(self.lengths)
        self.since_log = torch.zeros(2, device=args.device)  # nats, labels
        self.begun, self.first_step = time.monotonic(), 0
        self.run = Run(Path(args.output_dir).parent)
        self.record: dict = {}  # what makes the run's training, for the manifest
        trained = sum(value.numel() for value in self.model.parameters() if value.requires_grad)
        # three checkpoints, two and one being written: float32 weights, AdamW's two averages, the small files
        self.disk_bytes = 3 * (3 * 4 * trained + 1_000_000)

    def _get_train_sampler(self, train_dataset=None) -> LengthGroups:
        """Return rows of like length together, the same for any number of devices."""
        steps = self.steps_per_epoch
        return LengthGroups(self.lengths, self.batch_size, self.args.seed, lambda: self.state.global_step // steps)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a batch, and what its loss is divided by: the learned labels of an average batch.

        Rows of like length share a batch: divided by its own labels, each would count for less in longer answers.
        """
        return list(islice(epoch_iterator, num_batches)), self.labels_per_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the cross entropy of the learned labels, as the plain model does, but with logits for them only.

        The sum is divided by `num_items_in_batch`, the labels of a batch in all its micro-batches (whose gradients add
        up) on all devices (whose gradients are averaged); without it by the labels at hand.
        """
        learned, labels = inputs.pop("learned"), inputs.pop("labels").flatten()
        before = learned - 1  # the token that predicts a label
        head = self.model.get_output_embeddings()
        # A hook, since logits_to_keep takes the same positions for all rows: 1.46 times the work on real rows.
        # index_select, since for the gradient of a boolean mask torch sorts the positions on a GPU.
        with head.register_forward_pre_hook(lambda head, hidden: hidden[0].flatten(0, 1).index_select(0, before)):
            outputs = model(**inputs, use_cache=False)
        smooth = self.args.label_smoothing_factor
        nats = F.cross_entropy(
            outputs.logits.float(), labels.index_select(0, learned), reduction="none", label_smoothing=smooth
        )
        if self.model.training:
            self.since_log += torch.stack([nats.detach().sum(), torch.ones_like(nats).sum()])
        else:  # by row: on several devices the last batch is filled up with rows that were there before
            rows, width = inputs["input_ids"].shape
            by_row = torch.zeros(rows, 2, device=nats.device)
            by_row.index_add_(0, learned // width, torch.stack([nats.detach(), torch.ones_like(nats)], 1))
            self.since_log += self.accelerator.gather_for_metrics(by_row).sum(0)
        divisor = num_items_in_batch / self.accelerator.num_processes if num_items_in_batch else len(learned)
        loss = nats.sum() / divisor
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, **kwargs):
        """Return an evaluation's output, its loss in nats per learned label; AlpacaError where logits are asked for."""
        if not (kwargs.get("prediction_loss_only") or self.args.prediction_loss_only):
            what = "AnswerTrainer makes the logits of learned labels only"
            raise AlpacaError(f"{what}: take transformers' Trainer for `predict` and `compute_metrics`.")
        before, self.since_log = self.since_log, torch.zeros_like(self.since_log)
        output = super().evaluation_loop(*args, **kwargs)
        (nats, labels), self.since_log = self.since_log.tolist(), before
        loss = next(name for name in output.metrics if name.endswith("_loss"))  # eval_loss, or by another prefix
        output.metrics[loss] = nats / labels
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `loss` the nats per learned label since the last time, on all devices, and print a line for it."""
        if "loss" in logs:
            nats, labels = self.accelerator.reduce(self.since_log).tolist()
            logs["loss"] = nats / labels
            self.since_log.zero_()
        super().log(logs, start_time)
        step, steps = self.state.global_step, self.state.max_steps
        if "loss" in logs and self.state.is_world_process_zero:
            took, done = time.monotonic() - self.begun, step - self.first_step
            speed = f"{done * self.batch_size / took:.0f} rows a second, {took:.0f} s passed"
            left = f"about {took / done * (steps - step):.0f} s left"
            print(f"step {step} of {steps}: loss {logs['loss']:.3f}, {speed}, {left}", flush=True)

    def floating_point_ops(self, inputs) -> int:
        """Return 0: nobody reads the count, and it takes a twentieth of the pocket's step."""
        return 0

    def _get_output_dir(self, trial) -> str:
        """Return where Trainer writes a checkpoint: apart from the others, until it is complete."""
        return str(Path(self.args.output_dir) / PART)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """Write a checkpoint, and put it among the others once all processes have written their part."""
        super()._save_checkpoint(*args, **kwargs)
        state, folder = self.state, Path(self.args.output_dir)
        if state.best_global_step:
            state.best_model_checkpoint = str(folder / f"checkpoint-{state.best_global_step}")
        self.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            state.save_to_json(str(folder / PART / f"checkpoint-{state.global_step}" / TRAINER_STATE_NAME))
            finish_checkpoint(folder, state.global_step, self.args.save_total_limit, state.best_global_step)
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: bool | Path | str | None = None, **kwargs):
        """Train; AlpacaError where memory or disk are too small, or the base is broken.

        With True the run's training goes on from its last complete checkpoint, with False it starts over; both hold
        the run's lock, and say first how long it takes and what it needs. A path is a checkpoint to go on from.
        """
        of_run = isinstance(resume_from_checkpoint, bool)
        checkpoint = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, (str, Path)) else None
        with ExitStack() as stack:
            if of_run:
                check_weights(self.model.get_base_model())
                if is_main_process():
                    stack.enter_context(self.run.lock())
                checkpoint = resume_point(self.run, self, resume_from_checkpoint is True)
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else TrainerState()
            self.first_step = state.global_step
            stack.enter_context(check_disk_space(Path(self.args.output_dir), needed=self.disk_bytes))
            stack.enter_context(explained_out_of_memory(self.args.train_batch_size))
            stack.enter_context(lora_in_base_precision(self.model))
            if of_run:
                if is_main_process():
                    self.announce()
                set_seed(self.args.seed)  # whatever was drawn since the trainer was made, as by an evaluation
            self.since_log.zero_()
            self.begun = time.monotonic()
            # An evaluation before it marks the model as prepared, and accelerate would not have devices share gradients
            self.model.__dict__.pop("_is_accelerate_prepared", None)
            return super().train(str(checkpoint) if checkpoint else None, **kwargs)

    def announce(self) -> None:
        """Print how long the training takes from its first step on, what disk it needs, and what memory of a GPU.

        A step is run for real on the longest rows, which take the most memory; its time is scaled to rows of average
        length. The weights stay as they were.
        """
        args, first, cuda = self.args, self.first_step, self.args.device.type == "cuda"
        steps = args.max_steps if args.max_steps > 0 else math.ceil(self.steps_per_epoch * args.num_train_epochs)
        if first == steps:
            return print(f"This training is finished, all {steps} steps of it: `resume = False` would start it over.")
        if first:
            print(f"Going on after step {first} of {steps}.")
        longest = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)[-args.train_batch_size :]
        batch = self.data_collator(list(self._remove_unused_columns(self.train_dataset.select(longest))))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):  # kernels are loaded in the first
            begun = time.perf_counter()
            self.training_step(self.model, batch, num_items_in_batch=1.0).item()  # which waits for a GPU
            seconds = (time.perf_counter() - begun) * args.gradient_accumulation_steps
        self.model.zero_grad()
        seconds *= sum(self.lengths) / len(self.lengths) / max(self.lengths)
        memory = f"{tqdm.format_sizeof(torch.cuda.max_memory_allocated(), 'B')} of the GPU's memory, " if cuda else ""
        takes = f"about {(steps - first) * seconds / 60:.1f} minutes: {steps - first} steps of {seconds:.2f} s"
        print(f"The training takes {takes}, and the evaluations")
        print(f"The training needs {memory}at most {tqdm.format_sizeof(self.disk_bytes, 'B')} on disk")


@contextmanager
def explained_out_of_memory(rows: int) -> Iterator[None]:
    """Raise AlpacaError that says what to change where the block, with `rows` at once, runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        remedy = "a smaller `micro_batch_size`, with the same result, or a smaller `max_length` in another `run`"
        raise AlpacaError(f"Out of memory with {rows} rows at once: take {remedy}.") from error


@contextmanager
def save_adapter(trainer: AnswerTrainer) -> Iterator[Path]:
    """Give a folder to save the trained adapter and its tokenizer to, which becomes the run's `adapter`.

    The manifest then records what made it, and it gets its model card. Of several processes the main one saves.
    Errors as in `lora.adapter_folder`: the earlier adapter stays.
    """
    if not is_main_process():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    run, made = trainer.run, trainer.run.record("data")
    record = trainer.record or training_record(run, trainer)  # of a `train()` that was not the run's
    with run.lock():
        with adapter_folder(run.folder / "adapter", trainer.model, made["model"], made["model_revision"]) as part:
            yield part
        history = trainer.state.log_history
        last = {name: entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry}
        result = {"steps": trainer.state.global_step, **last}
        sha256 = content_hash(run.artifact("adapter"), "*.safetensors")
        run.write_record("adapter", record | {"result": result, "sha256": sha256})
        write_card(run.folder)


def finetune(folder: Path, **parameters) -> None:
    """Train and save the adapter of the run in `folder` by the cells of notebook 03, on all of torchrun's devices."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before anything is put on a GPU
    with redirect_stdout(sys.stdout if is_main_process() else None):
        run_cells(NOTEBOOKS[2], "training", parameters | {"run": str(folder.resolve()), "run_earlier": False})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alpaca_helpers.training",
        description="Train the adapter of a run whose data notebook 02 has prepared, by the cells of notebook 03.",
        epilog="On several devices: torchrun --nproc-per-node N -m alpaca_helpers.training runs/NAME",
    )
    parser.add_argument("run", metavar="RUN", help="name of the run, or a path to its folder")
    add_parameters(parser)
    options = parser.parse_args()
    # Up to transformers 5.15, several processes without a GPU resume on the device "cpu:0", unknown to torch.load
    torch.serialization.register_package(
        15, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )
    try:
        parameters = parse_parameters(options.p, run=options.run)
        folder = Run.named(parameters.pop("run"), make=False).folder
        refuse_dropped(parameters, NOTEBOOKS[2:3])
        finetune(folder, **parameters)
    except AlpacaError:
        if not is_main_process() and not torch.distributed.is_initialized():
            time.sleep(5)  # the main process says the same, unless torchrun ends it because this one has
            sys.exit(1)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_command(main, "Interrupted: the same command goes on from the last checkpoint.")
