"""Fine-tuning, as notebook 03's cells do it, and `python -m alpaca_helpers.training --help` for several devices."""

import argparse
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from datasets import load_from_disk
from peft import get_peft_model
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from . import AlpacaError
from .batches import LengthGroups, PadToLongest, add_learned, split_batch
from .card import write_card
from .checkpoints import CompleteCheckpoints, is_main_process, resume_point
from .console import run_command
from .data import IGNORED
from .files import check_disk_space, content_hash
from .lora import adapter_folder, check_trained, choose_targets, lora_config
from .models import base_dtype, check_weights, load_base, load_tokenizer
from .parameters import check_parameters
from .resources import announce, explained_out_of_memory
from .runs import artifact, lock_run, read_record, run_folder, write_record
from .speedups import faster_training


class AnswerTrainer(Trainer):
    """transformers' Trainer, which may stand in its place, with less waste and safer checkpoints.

    Overridden: the order of rows (`LengthGroups`); the loss (logits at learned labels only, each label with the same
    weight); the losses on show (nats per label); checkpoints (with checksums); `train` (with `faster_training`, and one
    sentence where memory or disk are too small).
    """

    def __init__(self, args: TrainingArguments, data_collator: Callable, **named):
        args._n_gpu = min(args.n_gpu, 1)  # one process uses one GPU; torchrun starts one for each
        asked, rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size, named["train_dataset"]
        self.batch_size = min(asked, len(rows))
        if asked > len(rows):  # a batch is what there is
            share = math.ceil(len(rows) / args.world_size)
            args.gradient_accumulation_steps = math.ceil(share / args.train_batch_size)
            args.per_device_train_batch_size = math.ceil(share / args.gradient_accumulation_steps)
        cuda = args.device.type == "cuda"
        args.dataloader_pin_memory = args.accelerator_config.non_blocking = cuda  # Python goes on while rows are sent
        args.logging_nan_inf_filter = False  # NaN is shown as such, and no step waits to be looked at
        super().__init__(args=args, data_collator=partial(add_learned, data_collator), **named)
        check_trained(self.model)
        self.add_callback(CompleteCheckpoints())
        self.add_callback(ProgressLines())
        learned = sum(label != IGNORED for labels in self.train_dataset["labels"] for label in labels[1:])
        self.labels_per_batch = self.batch_size * learned / len(self.train_dataset)
        self.since_log = torch.zeros(2, device=args.device)  # nats, labels

    def _get_train_sampler(self, train_dataset=None) -> LengthGroups:
        """Return rows of like length together, the same for any number of devices."""
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        steps = math.ceil(len(lengths) / self.batch_size)  # an epoch
        return LengthGroups(lengths, self.batch_size, self.args.seed, lambda: self.state.global_step // steps)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a batch, and what its loss is divided by: the learned labels of an average batch.

        Divided by its own, as usual, a label would count for less the longer its answer: rows of like length share a
        batch, so the batches differ in their number of labels (held-out loss of the pocket 0.0178 instead of 0.0166).
        """
        return list(islice(epoch_iterator, num_batches)), self.labels_per_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the cross entropy of the learned labels, as the plain model does, but with logits for them only.

        The sum is divided by `num_items_in_batch`, the labels of a batch in all its micro-batches, whose gradients add
        up, on all devices, whose gradients are averaged; without it by the labels at hand.
        """
        learned, labels = inputs.pop("learned"), inputs.pop("labels").flatten()
        before = learned - 1  # the token that predicts a label
        head = self.model.get_output_embeddings()
        # A hook, since logits_to_keep takes the same positions for all rows: 1.46 times the work on real rows.
        # index_select, since for the gradient of a boolean mask torch sorts the positions on a GPU.
        with head.register_forward_pre_hook(lambda head, hidden: hidden[0].flatten(0, 1).index_select(0, before)):
            outputs = model(**inputs, use_cache=False)
        nats = F.cross_entropy(outputs.logits.float(), labels.index_select(0, learned), reduction="none")
        loss = nats.sum()
        if self.model.training:
            self.since_log[0] += loss.detach()
            self.since_log[1] += len(learned)
        else:  # by row: on several devices the last batch is filled up with rows that were there before
            rows, width = inputs["input_ids"].shape
            by_row = torch.zeros(rows, 2, device=nats.device)
            by_row.index_add_(0, learned // width, torch.stack([nats.detach(), torch.ones_like(nats)], 1))
            self.since_log += self.accelerator.gather_for_metrics(by_row).sum(0)
        if num_items_in_batch is None:
            loss = loss / len(learned)
        else:
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *given, **named):
        """Return the output of an evaluation, its loss in nats per learned label, not as a mean of batch means."""
        before, self.since_log = self.since_log, torch.zeros_like(self.since_log)
        output = super().evaluation_loop(*given, **named)
        (nats, labels), self.since_log = self.since_log.tolist(), before
        loss = next(name for name in output.metrics if name.endswith("_loss"))  # eval_loss, or by another prefix
        output.metrics[loss] = nats / labels
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `loss` the nats per learned label since the last time, on all devices: in the unit of `eval_loss`."""
        if "loss" in logs:
            nats, labels = self.accelerator.reduce(self.since_log).tolist()
            logs["loss"] = nats / labels
            self.since_log.zero_()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Return 0: nobody reads the count, and it takes a twentieth of the pocket's step."""
        return 0

    def train(self, resume_from_checkpoint: bool | Path | str | None = None, **named):
        """Train; AlpacaError where memory or disk are too small, or the base is broken.

        With True the run's training goes on from its last complete checkpoint, with False it starts over; both hold
        the run's lock, and say first how long it takes and what it needs. A path is a checkpoint to go on from.
        """
        if isinstance(resume_from_checkpoint, bool):
            check_weights(self.model.get_base_model())
            with lock_run(self.run_folder()) if is_main_process() else nullcontext():
                checkpoint = resume_point(self.run_folder(), self, resume_from_checkpoint)
                if is_main_process():
                    announce(self)
                set_seed(self.args.seed)  # whatever was drawn since the trainer was made, as by an evaluation
                return self.train(checkpoint, **named)
        self.since_log.zero_()
        space = check_disk_space(Path(self.args.output_dir), needed=self.disk_bytes())
        with explained_out_of_memory(self.args.train_batch_size), space, faster_training(self.model):
            return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, **named)

    def run_folder(self) -> Path:
        """Return the folder of the run whose `checkpoints` the trainer writes."""
        return Path(self.args.output_dir).parent

    def steps_in_all(self) -> int:
        """Return the optimizer steps of the whole training."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(math.ceil(len(self.train_dataset) / self.batch_size) * self.args.num_train_epochs)

    def disk_bytes(self) -> int:
        """Return the room that the checkpoints take at most: two are kept while one is being written."""
        trained = sum(value.numel() for value in self.model.parameters() if value.requires_grad)
        return 3 * (3 * 4 * trained + 1_000_000)  # float32 weights and AdamW's two averages; the small files


class ProgressLines(TrainerCallback):
    """Prints a plain line at each logging step, for terminals and the logs of batch runs."""

    def on_train_begin(self, args, state, control, **named) -> None:
        """Note when and where the training begins."""
        self.begun, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **named) -> None:
        """Print steps, loss, rows a second and the time left."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        took, done = time.monotonic() - self.begun, state.global_step - self.first
        left = took / done * (state.max_steps - state.global_step)
        rows = done * args.train_batch_size * args.gradient_accumulation_steps * args.world_size / took
        speed = f"{rows:.0f} rows a second, {took:.0f} s passed, about {left:.0f} s left"
        print(f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}, {speed}", flush=True)


@contextmanager
def save_adapter(trainer: "AnswerTrainer") -> Iterator[Path]:
    """Give a folder to save the trained adapter and its tokenizer to, which becomes the run's `adapter`.

    All of it or nothing: the earlier adapter stays where the block fails, and where the new one is of no use. The
    manifest then notes what made it. Errors as in `lora.adapter_folder`.
    """
    folder, made = trainer.run_folder(), read_record(trainer.run_folder(), "data")
    with lock_run(folder):
        with adapter_folder(folder / "adapter", trainer.model, made["model"], made["model_revision"]) as part:
            yield part
        record_result(folder, trainer)


def data_collator(tokenizer, recipe: str) -> Callable:
    """Return the document's collator for its recipe, for the others one that pads to the longest row of a batch."""
    if recipe == "document":
        return DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
    return PadToLongest(tokenizer.pad_token_id)


def record_result(folder: Path, trainer: Trainer) -> None:
    """Write into the run's manifest what made the adapter, and what it came to; and the adapter's model card."""
    history = trainer.state.log_history
    last = {name: entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry}
    result = {"steps": trainer.state.global_step, **last}
    sha256 = content_hash(artifact(folder, "adapter"), "*.safetensors")
    write_record(folder, "adapter", trainer.record | {"result": result, "sha256": sha256})
    write_card(folder)


def make_trainer(
    folder: Path,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.1,
    target_modules: Sequence[str] | str | None = None,
    learning_rate: float | None = None,
    num_train_epochs: float | None = None,
    batch_size: int = 16,
    micro_batch_size: int = 16,
    report_to: str = "none",
    seed: int = 0,
) -> AnswerTrainer:
    """Return the trainer of the run's prepared data, as notebook 03's cells make it.

    The parameters are the notebook's, with its values; those that are None are the profile's, and `target_modules`
    those that peft knows for the model. Raises AlpacaError for `target_modules` that LoRA cannot correct.
    """
    prepared, data = read_record(folder, "data"), load_from_disk(artifact(folder, "data"))
    rows, accumulation = split_batch(batch_size, micro_batch_size)
    dtype = base_dtype()
    epochs = prepared["num_train_epochs"] if num_train_epochs is None else num_train_epochs
    tokenizer = load_tokenizer(prepared["model"], prepared["model_revision"])
    base = load_base(prepared["model"], prepared["model_revision"], dtype)
    target_modules = choose_targets(base, target_modules)
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=4 * rows,
        learning_rate=prepared["learning_rate"] if learning_rate is None else learning_rate,
        num_train_epochs=epochs,
        fp16=torch.cuda.is_available() and dtype == torch.float32,  # older GPUs; others hold the base in bfloat16
        eval_strategy="steps",
        logging_steps=0.1,  # of the training; evaluations come as often
        save_steps=0.1,
        save_total_limit=2,  # the newest, and one to go back to should it be broken
        report_to=report_to,
        seed=seed,
    )
    transposed = any(isinstance(layer, Conv1D) for layer in base.modules())
    set_seed(seed)
    return AnswerTrainer(
        model=get_peft_model(base, lora_config(lora_rank, lora_alpha, lora_dropout, target_modules, transposed)),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["heldout"],
        data_collator=data_collator(tokenizer, prepared["recipe"]),
    )


def finetune(folder: Path, resume: bool = True, **settings) -> None:
    """Train and save the run's adapter on all of torchrun's devices; without `resume` it starts over."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # before anything is put on a GPU
    with lock_run(folder) if is_main_process() else nullcontext():
        trainer = make_trainer(folder, **settings)
        trainer.train(resume_from_checkpoint=resume)
        if is_main_process():
            with save_adapter(trainer) as part:
                trainer.model.save_pretrained(part)
                prepared = read_record(folder, "data")
                load_tokenizer(prepared["model"], prepared["model_revision"]).save_pretrained(part)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alpaca_helpers.training",
        description="Train the adapter of a run whose data notebook 02 has prepared, as notebook 03 does.",
        epilog="On several devices: torchrun --nproc-per-node N -m alpaca_helpers.training runs/NAME",
    )
    parser.add_argument("folder", metavar="RUN", nargs="?", help="name of the run, or a path to its folder")
    parser.add_argument("--run", help="the same; torchrun under Python 3.11 takes it for its own --run-path")
    parser.add_argument("--no-resume", action="store_true", help="forget the run's checkpoints and start over")
    settings = inspect.signature(make_trainer).parameters
    for name in settings.keys() - {"folder"}:
        several, own = ("+", "the architecture's") if name == "target_modules" else (None, "the profile's")
        default = own if settings[name].default is None else settings[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", nargs=several, help=f"({default})")
    options = vars(parser.parse_args())
    if not (run := options.pop("folder") or options.pop("run")):
        parser.error("which RUN? Give its name, or a path to its folder")
    # Up to transformers 5.15, several processes without a GPU resume on the device "cpu:0", unknown to torch.load
    torch.serialization.register_package(
        15, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )
    try:
        folder = run_folder(check_parameters(run=run), make=False)
        artifact(folder, "data")
        chosen = {name: value for name, value in options.items() if name in settings and value is not None}
        given = {name: check_parameters(**{name: value}) for name, value in chosen.items()}
        finetune(folder, resume=not options["no_resume"], **given)
    except AlpacaError:
        if not is_main_process() and not torch.distributed.is_initialized():
            sys.exit(1)  # the main process says the same
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_command(main, "Interrupted: the same command goes on from the last checkpoint.")
