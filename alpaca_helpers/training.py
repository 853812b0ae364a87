"""Fine-tuning: batches, loss, arguments, checkpoints; `python -m alpaca_helpers.training --help` for several devices.

Notebook 03 does the same, cell by cell, with the same functions.
"""

import argparse
import hashlib
import json
import math
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from datasets import load_from_disk
from peft import get_peft_model
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.activations import NewGELUActivation

from . import PROJECT, AlpacaError
from .data import IGNORED
from .lora import lora_config, save_adapter
from .models import load_base, load_tokenizer
from .profiles import Profile
from .runs import artifact, read_manifest, record, room_on_disk, run_folder, write_json
from .sharing import write_card

COMPLETE = "complete.json"  # written last into a checkpoint: the SHA-256 of each of its files
INPUTS = {"input_ids", "attention_mask", "labels"}  # the columns that a batch is made of


def base_dtype() -> torch.dtype:
    """Return what to hold the frozen base in: bfloat16 where the device multiplies it in hardware, else float32."""
    if torch.cuda.is_available():
        native = torch.cuda.get_device_capability() >= (8, 0)  # is_bf16_supported() counts emulation too
    else:
        units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, unit, bool)() for unit in units)
    return torch.bfloat16 if native else torch.float32


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
        report_to=[],
        seed=settings.seed,
    )


def split_batch(settings: Profile) -> tuple[int, int]:
    """Return the rows in a device's memory at once, and how often they add up to its share of a batch.

    Raises AlpacaError if the devices cannot share the batch evenly.
    """
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
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
        columns = {name: [torch.tensor(row[name]) for row in rows] for name in fill}
        return {name: pad_sequence(columns[name], batch_first=True, padding_value=fill[name]) for name in fill}

    return pad


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

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.add_callback(CompleteCheckpoints())
        self.add_callback(ProgressLines())
        args = self.args
        self.batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross entropy of the learned labels, as the plain model does, but with logits for them only.

        The projection onto the whole vocabulary sees no other position. `num_items_in_batch` counts the learned labels
        of the whole batch: of all its micro-batches, whose gradients add up, on all devices, whose gradients are
        averaged.
        """
        labels = inputs.pop("labels")[:, 1:]
        learned = labels != IGNORED
        head = self.model.get_output_embeddings()
        with head.register_forward_pre_hook(lambda head, hidden: hidden[0][:, :-1][learned]):
            outputs = model(**inputs, use_cache=False)
        loss = F.cross_entropy(outputs.logits.float(), labels[learned], reduction="sum")
        if num_items_in_batch is None:
            loss = loss / learned.sum()
        else:
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: Path | str | None = None, **named):
        """Train, from a checkpoint on if one is given.

        Raises AlpacaError where memory or disk are too small, saying what to change.
        """
        trained = sum(value.numel() for value in self.model.parameters() if value.requires_grad)
        checkpoint = 3 * 4 * trained + 1_000_000  # bytes: float32 weights and AdamW's two averages; the small files
        try:
            with room_on_disk(Path(self.args.output_dir), needed=3 * checkpoint):  # two kept, one being written
                return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, **named)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            rows = self.args.train_batch_size
            raise AlpacaError(
                f"Out of memory with {rows} rows at once: set `micro_batch_size` to {max(1, rows // 2)}; the batch "
                "and the result stay the same, and training goes on from its last checkpoint."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the adapter's weights alone: the base is known, and peft may ask the Hub about it otherwise."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)


class CompleteCheckpoints(TrainerCallback):
    """Marks each checkpoint as complete, once all processes have written their files."""

    def on_save(self, args, state, control, **named) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            write_json(folder / COMPLETE, {path.name: _sha256(path) for path in _files(folder)})


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


def lighten(model):
    """Return `model` with less to compute: its activation in one operation instead of seven, no dropout in the base.

    LoRA's own dropout stays. The base's was for its pretraining: nothing of it is trained here.
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")
        if isinstance(module, nn.Dropout) and "lora" not in name:
            module.p = 0.0
    return model


def make_trainer(model, tokenizer, data, settings: Profile, recipe: str, folder: Path) -> Trainer:
    """Return the trainer of `model` on `data` (`train` and `heldout`, tokenized)."""
    return AnswerTrainer(
        model=lighten(model),
        args=training_arguments(settings, folder),
        train_dataset=data["train"],
        eval_dataset=data["heldout"],
        data_collator=data_collator(tokenizer, recipe),
    )


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of the run that is whole, or None; warn of each newer one that is not."""
    for checkpoint in sorted((folder / "checkpoints").glob("checkpoint-*"), key=_step, reverse=True):
        if not (fault := checkpoint_fault(checkpoint)):
            return checkpoint
        warnings.warn(f"{checkpoint.name} is not used: {fault}.", stacklevel=2)
    return None


def checkpoint_fault(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint ("" if nothing): it was cut while being written, or changed since."""
    try:
        saved = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "its writing was cut"
    for name, digest in saved.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} is damaged"
    return ""


def resume_point(folder: Path, settings: Profile, recipe: str, resume: bool = True) -> Path | None:
    """Record what makes this training, and return the checkpoint to go on from; None: from the beginning.

    Other versions, another machine, `micro_batch_size` or number of processes change rounding and the draws of
    dropout alone, so a training may go on under them.

    Args:
        resume: False forgets the run's checkpoints.

    Raises AlpacaError that shows the differences if the checkpoints were made by settings that give another result.
    """
    if is_main_process():
        made_by = training_record(folder, settings, recipe)
        if not resume:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if any((folder / "checkpoints").glob("checkpoint-*")):
            before = read_manifest(folder).get("training", {})
            refuse_changes(before, made_by)
            made_by["earlier"] = made_elsewhere(before, made_by)
        record(folder, "training", made_by)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint and is_main_process():
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        done, steps = state["global_step"], state["max_steps"]
        finished = f"This training is finished, all {steps} steps of it: `resume = False` would start it over."
        print(finished if done == steps else f"Going on after step {done} of {steps}.")
    return checkpoint


def made_elsewhere(before: dict, now: dict) -> list[dict]:
    """Return on what the parts of a training were made before it came here, if that was elsewhere."""
    place = {name: before.get(name) for name in ("versions", "hardware", "commit", "processes")}
    return before.get("earlier", []) + [place] * any(now[name] != value for name, value in place.items())


def refuse_changes(before: dict, now: dict) -> None:
    """Raise AlpacaError that shows what differs, among what changes the result, between two training records."""
    free = {"name", "dataset", "heldout", "micro_batch_size", "processes", "versions", "hardware", "commit"}
    changes = [
        f"{key} {before.get(key)} -> {now[key]}" for key in now if key not in free and before.get(key) != now[key]
    ]
    if changes:
        raise AlpacaError(
            f"This run's checkpoints were made with other settings ({'; '.join(changes)}): go back to those, take "
            "another `run`, or set `resume = False` to start over."
        )


def training_record(folder: Path, settings: Profile, recipe: str) -> dict:
    """Return what makes a training, for the manifest: settings, recipe, data, versions, hardware, commit."""
    libraries = ("torch", "transformers", "peft", "datasets", "accelerate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    git = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except OSError:
        commit = None
    made_by = {
        **asdict(settings),
        "recipe": recipe,
        "fingerprint": read_manifest(folder)["data"]["fingerprint"],
        "dtype": str(base_dtype()).removeprefix("torch."),
        "processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": f"{device}, {torch.get_num_threads()} threads",
        "commit": commit,
    }
    return json.loads(json.dumps(made_by))  # as it will be read back


def is_main_process() -> bool:
    """Return whether this process is the one that writes and prints."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def record_result(trainer: Trainer, folder: Path) -> None:
    """Add to the run's manifest what the training came to, and write the adapter's model card."""
    history = trainer.state.log_history
    last = {name: entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry}
    result = {"steps": trainer.state.global_step, **last}
    record(folder, "training", read_manifest(folder)["training"] | {"result": result})
    write_card(folder)


def finetune(folder: Path, settings: Profile, recipe: str, resume: bool = True) -> None:
    """Train the run's adapter from its prepared data, as notebook 03's cells do, on all of torchrun's devices."""
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


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name != COMPLETE]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alpaca_helpers.training",
        description="Train the adapter of a run whose data notebook 02 has prepared, as notebook 03 does.",
        epilog="On several devices: torchrun --nproc-per-node N -m alpaca_helpers.training --run runs/NAME",
    )
    parser.add_argument("--run", required=True, help="name of the run, or a path to its folder")
    parser.add_argument("--no-resume", action="store_true", help="forget the run's checkpoints and start over")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="a setting, as notebook 03's"
    )
    options = parser.parse_args()
    try:
        folder = run_folder(options.run)
        artifact(folder, "data")
        made_by = read_manifest(folder)["data"]
        settings = Profile(**{field.name: made_by[field.name] for field in fields(Profile)})
        settings = replace(settings, **{key: type(getattr(settings, key))(value) for key, value in options.p})
        finetune(folder, settings, made_by["recipe"], resume=not options.no_resume)
    except AlpacaError as error:
        sys.exit(f"{error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
