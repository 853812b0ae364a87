"""Atomic checkpoints, and resuming from the last complete one, under the same settings only."""

import json
import os
import platform
import re
import shutil
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import Trainer

from . import AlpacaError, __version__, locate
from .files import content_hash, refuse_foreign_files, verify_checksums, write_checksums
from .run import Run

PART = ".alpaca-part"  # the folder that a checkpoint is written to, before it takes its place among the checkpoints
# Of peft's configuration, besides rank, alpha, dropout and targets: those that change the result.
LORA = "use_rslora rank_pattern alpha_pattern layers_to_transform layers_pattern exclude_modules".split()
ARGUMENTS = (  # of transformers' TrainingArguments: those that change the result
    "learning_rate num_train_epochs max_steps lr_scheduler_type warmup_steps weight_decay max_grad_norm optim "
    "adam_beta1 adam_beta2 adam_epsilon label_smoothing_factor seed lr_scheduler_kwargs optim_args neftune_noise_alpha"
).split()
# What may differ when a training goes on: names, and what changes rounding and the draws of dropout at most.
FREE = {"name", "dataset", "heldout", "micro_batch_size", "versions", "hardware", "dtype", "processes"}


def finish_checkpoint(checkpoints: Path, step: int, limit: int | None, best: int | None) -> None:
    """Put the checkpoint of this step, which is in `PART`, among the `checkpoints`, with its checksums.

    Of those that hold nothing of anybody else, the newest `limit` are kept, and the `best` one.
    """
    done = checkpoints / f"checkpoint-{step}"
    write_checksums(checkpoints / PART / done.name)
    refuse_foreign_files(done)
    if done.exists():
        _set_aside(done)
    (checkpoints / PART / done.name).rename(done)
    for checkpoint in _checkpoints(checkpoints)[limit:] if limit else []:
        with suppress(AlpacaError):  # somebody's file is in it
            refuse_foreign_files(checkpoint)
            if checkpoint.name != f"checkpoint-{best}":
                _set_aside(checkpoint)
    shutil.rmtree(checkpoints / PART)


def _set_aside(checkpoint: Path) -> None:
    """Put a checkpoint into `PART`, which is removed next: cut in that, no part of it is left among the others."""
    (checkpoint.parent / PART).mkdir(exist_ok=True)
    checkpoint.rename(checkpoint.parent / PART / f"old-{checkpoint.name}")


def last_complete_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint in the folder, or None; warn of each newer one that is not complete."""
    for checkpoint in _checkpoints(checkpoints):
        if not (wrong := verify_checksums(checkpoint)):
            return checkpoint
        warnings.warn(f"{checkpoint.name} is not used: {wrong}.", stacklevel=2)
    return None


def resume_point(run: Run, trainer: Trainer, resume: bool = True) -> Path | None:
    """Record what makes this training, and return the checkpoint to go on from; None: from the beginning.

    The run's lock is to be held. `resume` False removes the run's checkpoints. Raises AlpacaError that shows the
    differences if these were made by settings that give another result; what is `FREE` may differ. It is raised too,
    before anything is removed, for a file in a checkpoint or the adapter that is not recorded as written here.
    """
    folder = Path(trainer.args.output_dir)
    if is_main_process():
        now, checkpoints = training_record(run, trainer), _checkpoints(folder)
        for recorded in (run.folder / "adapter", *checkpoints):
            refuse_foreign_files(recorded)
        shutil.rmtree(folder / PART, ignore_errors=True)
        for checkpoint in [] if resume else checkpoints:
            _set_aside(checkpoint)
        shutil.rmtree(folder / PART, ignore_errors=True)
        if resume and checkpoints:
            before = run.manifest().get("training", {})
            changed = [key for key in now if key not in FREE and (before.get(key) or None) != (now[key] or None)]
            if changed:
                changes = "; ".join(f"{key} {before.get(key)} -> {now[key]}" for key in changed)
                what = f"This run's checkpoints were made with other settings ({changes})"
                remedy = "go back to those, take another `run`, or set `resume = False` to start over"
                raise AlpacaError(f"{what}: {remedy}.")
        run.write_record("training", now)
        trainer.record = now  # what is saved when the training ends tells of this, whatever the folder holds by then
    trainer.accelerator.wait_for_everyone()
    return last_complete_checkpoint(folder)


def training_record(run: Run, trainer: Trainer) -> dict:
    """Return what makes a training, for the manifest, from the objects that train: whatever was edited is in it."""
    data, args = run.record("data"), trainer.args
    lora = trainer.model.active_peft_config
    libraries = ("torch", "transformers", "peft", "datasets", "accelerate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    record = data | {
        "lora_rank": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": lora.target_modules if isinstance(lora.target_modules, str) else sorted(lora.target_modules),
        **{name: getattr(lora, name) for name in LORA},
        **{name: getattr(args, name) for name in ARGUMENTS},
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "micro_batch_size": args.train_batch_size,
        "base": content_hash(locate(data["model"]), "*.safetensors") or None,  # on the Hub, the revision tells
        "dtype": str(trainer.model.get_base_model().dtype).removeprefix("torch."),
        "processes": processes(),
        "versions": {"alpaca_helpers": __version__, "python": platform.python_version()}
        | {name: version(name) for name in libraries},
        "hardware": f"{device}, {torch.get_num_threads()} threads",
    }
    return json.loads(json.dumps(record, default=str))  # as it will be read back


def processes() -> int:
    """Return how many processes train together, as torchrun told each of them before it began."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _checkpoints(folder: Path) -> list[Path]:
    """Return Trainer's own checkpoints in the folder, the newest first; a copy or `checkpoint-best` is not its."""
    paths = [path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[1-9][0-9]*", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
