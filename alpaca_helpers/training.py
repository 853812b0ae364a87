"""Fine-tuning: arguments, batches, loss; `python -m alpaca_helpers.training --help` for several devices.

Notebook 03 does the same, cell by cell, with the same functions.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from datasets import load_from_disk
from peft import get_peft_model
from peft.tuners import lora
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    AttentionInterface,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import AlpacaError
from .checkpoints import CompleteCheckpoints, is_main_process, processes, resume_point
from .data import IGNORED
from .lora import lora_config, save_adapter
from .models import base_dtype, load_base, load_tokenizer
from .profiles import Profile
from .runs import artifact, check_disk_space, lock_run, read_record, run_folder, write_record
from .sharing import write_card

# transformers 5.15 resumes several processes without a GPU on the device "cpu:0", which torch cannot load to
torch.serialization.register_package(
    15, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)

# torch's own attention, under a name for which transformers makes no mask
AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)

INPUTS = {"input_ids", "attention_mask", "labels"}  # the columns that a batch is made of


def training_arguments(settings: Profile, folder: Path) -> TrainingArguments:
    """Return the document's training arguments, with the profile's numbers; checkpoints go to `folder`/checkpoints.

    Ten times, evenly spread over the training: a line of losses, and a checkpoint.
    """
    micro_batch_size, accumulation = split_batch(settings)
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=4 * micro_batch_size,
        gradient_accumulation_steps=accumulation,
        fp16=torch.cuda.is_available() and base_dtype() == torch.float32,  # older GPUs; the others hold it in bf16
        eval_strategy="steps",
        save_strategy="steps",
        logging_steps=0.1,
        eval_steps=0.1,
        save_steps=0.1,
        save_total_limit=2,  # the newest, and one to go back to should it be broken
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # Python goes on while rows are sent
        logging_nan_inf_filter=False,  # a loss that is none is shown as such, and no step waits to be looked at
        report_to=[],
        seed=settings.seed,
    )


def split_batch(settings: Profile) -> tuple[int, int]:
    """Return the rows in a device's memory at once, and how often they add up to its share of a batch.

    Raises AlpacaError if the devices cannot share the batch evenly.
    """
    devices = processes()
    if settings.batch_size % devices:
        raise AlpacaError(
            f"A batch of {settings.batch_size} rows cannot be shared by {devices} processes: choose a `batch_size` "
            f"that {devices} divides."
        )
    share = settings.batch_size // devices
    rows = max(size for size in range(1, share + 1) if share % size == 0 and size <= settings.micro_batch_size)
    return rows, share // rows


def data_collator(tokenizer, recipe: str):
    """Return what makes a batch of rows: the document's collator, or one that pads right, to the longest row only.

    A padded position needs no attention mask there: no real token comes after it, so none sees it.
    """
    if recipe == "document":
        return DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)

    def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED}
        longest = max(len(row["input_ids"]) for row in rows)
        padded = {key: [row[key] + [fill[key]] * (longest - len(row[key])) for row in rows] for key in fill}
        return {key: torch.tensor(values) for key, values in padded.items()}

    return pad


def point_out_learned(collate: Callable, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return the batch of `rows`, and as `learned` the numbers of the labels to learn, counted through the batch.

    They are looked for here, in main memory: to look on a GPU is to wait until it has done all that it was given.
    """
    batch = dict(collate(rows))
    predicted = F.pad(batch["labels"][:, 1:] != IGNORED, (1, 0))  # nothing stands before a row's first token
    return batch | {"learned": predicted.flatten().nonzero().squeeze(1)}


class LengthGroups(Sampler[int]):
    """Row numbers in an order that puts rows of like length into the same batch; another order each epoch.

    Rows are shuffled, sorted by length within every `STEPS` batches, and these batches shuffled. Seed and epoch alone
    decide the order: a resumed training goes on in it, and any number of devices cut the same batches from it. The
    last batch is filled up with the rows that the shuffle began with.
    """

    STEPS = 16

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        rows = [rows[i % len(rows)] for i in range(len(self))]
        group = self.STEPS * self.batch_size
        groups = [sorted(rows[i : i + group], key=self.lengths.__getitem__) for i in range(0, len(rows), group)]
        rows = [row for group in groups for row in group]
        for batch in torch.randperm(len(rows) // self.batch_size, generator=generator).tolist():
            yield from rows[batch * self.batch_size : (batch + 1) * self.batch_size]


class AnswerTrainer(Trainer):
    """transformers' Trainer with three things of its own: the order of rows, the loss, checkpoints that are whole."""

    def __init__(self, args: TrainingArguments, data_collator: Callable, **named):
        args._n_gpu = min(args.n_gpu, 1)  # one process uses one GPU; torchrun starts one for each
        super().__init__(args=args, data_collator=partial(point_out_learned, data_collator), **named)
        self.add_callback(CompleteCheckpoints())
        self.add_callback(ProgressLines())
        self.batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        learned = sum(label != IGNORED for labels in self.train_dataset["labels"] for label in labels[1:])
        self.labels_a_batch = self.batch_size * learned / len(self.train_dataset)
        self.since_log = torch.zeros(2, device=args.device)  # nats, labels
        steps = args.num_train_epochs * math.ceil(len(self.train_dataset) / self.batch_size)
        for name in ("logging_steps", "eval_steps", "save_steps"):  # a share of the training, in steps
            setattr(args, name, math.ceil(steps * getattr(args, name)))

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of rows of like length, shared out among the devices."""
        args, rows = self.args, self.train_dataset
        rows = rows.select_columns([name for name in rows.column_names if name in INPUTS])
        order = LengthGroups(
            [len(ids) for ids in rows["input_ids"]],
            self.batch_size,
            args.seed,
            epoch=lambda: self.state.global_step // (len(order) // self.batch_size),
        )
        return self.accelerator.prepare(
            DataLoader(
                rows,
                args.train_batch_size,
                sampler=order,
                collate_fn=self.data_collator,
                pin_memory=args.dataloader_pin_memory,
            )
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a batch, and what its loss is divided by: the learned labels of an average batch.

        Divided by its own, as usual, a label would count for less the longer its answer: rows of like length share a
        batch, so the batches differ in their number of labels.
        """
        return list(islice(epoch_iterator, num_batches)), self.labels_a_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the cross entropy of the learned labels, as the plain model does, but with logits for them only.

        The projection onto the whole vocabulary sees no other position. The sum is divided by `num_items_in_batch`: a
        number of labels in a whole batch, that is in all its micro-batches, whose gradients add up, on all devices,
        whose gradients are averaged. Without it, it is divided by the labels at hand.
        """
        learned, labels = inputs.pop("learned"), inputs.pop("labels").flatten()
        predicting = learned - 1  # the token before a label
        head = self.model.get_output_embeddings()
        # by number: for the gradient of a choice by mask torch sorts the positions on a GPU
        with head.register_forward_pre_hook(lambda head, hidden: hidden[0].flatten(0, 1).index_select(0, predicting)):
            outputs = model(**inputs, use_cache=False)
        loss = F.cross_entropy(outputs.logits.float(), labels.index_select(0, learned), reduction="sum")
        if self.model.training:
            self.since_log[0] += loss.detach()
            self.since_log[1] += len(learned)
        if num_items_in_batch is None:
            loss = loss / len(learned)
        else:
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `loss` the nats a learned label since the last time, on all devices: in the unit of `eval_loss`."""
        if "loss" in logs:
            nats, labels = self.accelerator.reduce(self.since_log).tolist()
            logs["loss"] = nats / labels
            self.since_log.zero_()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Return 0: nobody reads the count, for which Trainer visits every parameter anew at each step."""
        return 0

    def train(self, resume_from_checkpoint: Path | str | None = None, **named):
        """Train, from a checkpoint on if one is given.

        Raises AlpacaError where memory or disk are too small, saying what to change.
        """
        trained = sum(value.numel() for value in self.model.parameters() if value.requires_grad)
        checkpoint = 3 * 4 * trained + 1_000_000  # bytes: float32 weights and AdamW's two averages; the small files
        try:
            folder = Path(self.args.output_dir)
            with (
                lock_run(folder.parent) if self.args.process_index == 0 else nullcontext(),
                check_disk_space(folder, needed=3 * checkpoint),  # two kept, one being written
                without_mask(self.model),
            ):
                return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, **named)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            rows = self.args.train_batch_size
            remedy = f"set `micro_batch_size` to {rows // 2}; the batch and the result stay the same"
            raise AlpacaError(
                f"Out of memory with {rows} row{'s' * (rows > 1)} at once: "
                f"{remedy if rows > 1 else 'take a smaller `max_length` or a smaller `model`, in another `run`'}, and "
                "training goes on from its last checkpoint."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the adapter's weights alone: the base is known, and peft may ask the Hub about it otherwise."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)


class ProgressLines(TrainerCallback):
    """Prints a plain line at each logging step, for terminals and the logs of batch runs."""

    def on_train_begin(self, args, state, control, **named) -> None:
        self.begun, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **named) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        took, done = time.monotonic() - self.begun, state.global_step - self.first
        left = took / done * (state.max_steps - state.global_step)
        rows = done * args.train_batch_size * args.gradient_accumulation_steps * args.world_size / took
        print(
            f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}, {rows:.0f} rows a second, "
            f"{took:.0f} s passed, about {left:.0f} s left",
            flush=True,
        )


def lighten(model, max_length: int):
    """Return `model` with less to compute: its activation in one operation instead of seven, no dropout in the base.

    LoRA's own dropout stays. The base's was for its pretraining: nothing of it is trained here. In training, LoRA's
    products are computed in the precision of what they are added to; its weights stay float32. On a CPU in bfloat16,
    attention within up to 256 tokens is computed step by step: the gradient of torch's fused attention takes longer. On
    a GPU the output layer is widened. The modules of `model` are from now on those that it has.
    """
    if model.device.type == "cpu" and model.dtype == torch.bfloat16 and max_length <= 256:
        model.set_attn_implementation("eager")
    if model.device.type == "cuda":
        head = model.get_output_embeddings()
        widen(getattr(head, "base_layer", head))  # LoRA's own, if it is put there
    for name, module in model.named_modules():
        if isinstance(module, lora.Linear):
            module.forward = partial(_lora, module)
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")
        if isinstance(module, nn.Dropout) and "lora" not in name:
            module.p = 0.0
    # at each step Trainer asks for all parameters twice and for training mode once, each a walk through the modules
    tuned, modules = type(model), list(model.modules())
    parameters = list(tuned.parameters(model))
    model.parameters = lambda recurse=True: iter(parameters)
    model.train = lambda mode=True: model if all(m.training == mode for m in modules) else tuned.train(model, mode)
    return model


@contextmanager
def without_mask(model) -> Iterator[None]:
    """Within the block, let torch's attention see all that comes before a token, without a mask.

    Rows padded right need no more. To make a mask, transformers would search each batch for rows packed into one, and
    wait for the GPU to tell.
    """
    usual = model.config._attn_implementation
    if usual == "sdpa":
        model.set_attn_implementation("sdpa_without_mask")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def widen(head: nn.Linear) -> None:
    """Let a frozen output layer compute a multiple of 64 columns and give its own: 50,257 do not suit matrix units."""
    words = len(head.weight)
    widened = F.pad(head.weight.detach(), (0, 0, 0, -words % 64))
    head.forward = lambda hidden: F.linear(hidden, widened)[..., :words]


def _lora(layer: lora.Linear, x: torch.Tensor, **named) -> torch.Tensor:
    """The layer's own `forward`; in training, LoRA in the precision of `x`, its second product added as it is made."""
    if not layer.training or layer.disable_adapters or layer.merged or layer.lora_variant or named:
        return type(layer).forward(layer, x, **named)
    result = layer.base_layer(x)
    for name in filter(layer.lora_A.__contains__, layer.active_adapters):
        a, b = layer.lora_A[name].weight.to(x.dtype), layer.lora_B[name].weight * layer.scaling[name]
        reduced = F.linear(layer.lora_dropout[name](x), a)
        result = torch.addmm(result.flatten(0, -2), reduced.flatten(0, -2), b.to(x.dtype).t()).view(result.shape)
    return result


def make_trainer(model, tokenizer, data, settings: Profile, recipe: str, folder: Path) -> Trainer:
    """Return the trainer of `model` on `data` (`train` and `heldout`, tokenized)."""
    return AnswerTrainer(
        model=lighten(model, settings.max_length),
        args=training_arguments(settings, folder),
        train_dataset=data["train"],
        eval_dataset=data["heldout"],
        data_collator=data_collator(tokenizer, recipe),
    )


def record_result(trainer: Trainer, folder: Path) -> None:
    """Add to the run's manifest what the training came to, and write the adapter's model card."""
    history = trainer.state.log_history
    last = {name: entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry}
    result = {"steps": trainer.state.global_step, **last}
    write_record(folder, "training", read_record(folder, "training") | {"result": result})
    write_card(folder)


def finetune(folder: Path, settings: Profile, recipe: str, resume: bool = True) -> None:
    """Train the run's adapter from its prepared data, as notebook 03's cells do, on all of torchrun's devices."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # before anything is put on a GPU
    data = load_from_disk(artifact(folder, "data"))
    tokenizer = load_tokenizer(settings.model, settings.model_revision)
    set_seed(settings.seed)
    base = load_base(settings.model, settings.model_revision, base_dtype())
    config = lora_config(settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.target_modules)
    model = get_peft_model(base, config)
    trainer = make_trainer(model, tokenizer, data, settings, recipe, folder)
    trainer.train(resume_from_checkpoint=resume_point(folder, settings, recipe, resume))
    if is_main_process():
        save_adapter(model, tokenizer, folder / "adapter")
        record_result(trainer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alpaca_helpers.training",
        description="Train the adapter of a run whose data notebook 02 has prepared, as notebook 03 does.",
        epilog="On several devices: torchrun --nproc-per-node N -m alpaca_helpers.training runs/NAME",
    )
    parser.add_argument("folder", metavar="RUN", nargs="?", help="name of the run, or a path to its folder")
    parser.add_argument("--run", help="the same; torchrun under Python 3.11 takes it for its own --run-path")
    parser.add_argument("--no-resume", action="store_true", help="forget the run's checkpoints and start over")
    parser.add_argument("--micro-batch-size", type=int, help="rows in memory at once, a device (as prepared)")
    options = parser.parse_args()
    if not (run := options.folder or options.run):
        parser.error("which RUN? Give its name, or a path to its folder")
    try:
        folder = run_folder(run, make=False)
        artifact(folder, "data")
        prepared = read_record(folder, "data")
        settings = Profile(**{field.name: prepared[field.name] for field in fields(Profile)})
        settings = replace(settings, micro_batch_size=options.micro_batch_size or settings.micro_batch_size)
        finetune(folder, settings, prepared["recipe"], resume=not options.no_resume)
    except AlpacaError as error:
        sys.exit(f"{error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
