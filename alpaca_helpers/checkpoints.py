"""Checkpoints with checksums, and resuming: from the last complete one, under the same settings only."""

import json
import os
import platform
import re
import shutil
import subprocess
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback

from . import PACKAGE, AlpacaError, locate
from .files import CHECKSUMS, content_hash, refuse_foreign_files, verify_checksums, write_checksums, write_json
from .run import Run

FILES = (  # that Trainer writes into a checkpoint, besides the random state of each of several processes
    "README.md adapter_config.json adapter_model.safetensors optimizer.pt scaler.pt scheduler.pt trainer_state.json "
    "training_args.bin rng_state.pth"
).split()
LORA = "bias use_rslora use_dora".split()  # of peft's configuration, besides rank, alpha, dropout and targets
ARGUMENTS = (  # of transformers' TrainingArguments: those that change the result
    "learning_rate num_train_epochs max_steps lr_scheduler_type warmup_steps weight_decay max_grad_norm optim "
    "adam_beta1 adam_beta2 adam_epsilon label_smoothing_factor seed"
).split()
PLACE = ("versions", "hardware", "dtype", "commit", "processes")  # what a training was made on
# What may differ when a training goes on: it changes rounding and the draws of dropout at most.
FREE = {"name", "dataset", "heldout", "micro_batch_size", *PLACE}


class CompleteCheckpoints(TrainerCallback):
    """Records which files of a checkpoint are Trainer's, and their checksums once all processes have written them.

    `save_total_limit` is kept here: Trainer itself would remove somebody's checkpoint-best, too.
    """

    limit: int | None = None  # the checkpoints that are kept

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Take `save_total_limit` over; record what is about to be written, so that what a cut leaves is known."""
        self.limit, args.save_total_limit = args.save_total_limit or self.limit, None
        if control.should_save and state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            refuse_foreign_files(checkpoint)
            checkpoint.mkdir(parents=True, exist_ok=True)
            states = [f"rng_state_{rank}.pth" for rank in range(args.world_size)]
            write_json(checkpoint / CHECKSUMS, dict.fromkeys(FILES + states, ""))

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs) -> None:
        """Mark the newest checkpoint as complete, and remove the oldest that are recorded."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            write_checksums(folder / f"checkpoint-{state.global_step}")
            for checkpoint in _checkpoints(folder)[self.limit :] if self.limit else []:
                with suppress(AlpacaError):  # somebody's file is in it
                    refuse_foreign_files(checkpoint)
                    if checkpoint != Path(state.best_model_checkpoint or ""):
                        shutil.rmtree(checkpoint)


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
    checkpoints = Path(trainer.args.output_dir)
    if is_main_process():
        now = training_record(run, trainer)
        for recorded in (run.folder / "adapter", *_checkpoints(checkpoints)):
            refuse_foreign_files(recorded)
        for recorded in [] if resume else _checkpoints(checkpoints):
            shutil.rmtree(recorded)
        if _checkpoints(checkpoints):
            before = run.manifest().get("training")
            before = before if isinstance(before, dict) else {}
            refuse_changes(before, now)
            place = {name: before.get(name) for name in PLACE}
            moved = any(now[name] != value for name, value in place.items())
            now["earlier"] = before.get("earlier", []) + [place] * moved  # on what its parts were made, if elsewhere
        run.write_record("training", now)
        trainer.record = now  # what is saved when the training ends tells of this, whatever the folder holds by then
    trainer.accelerator.wait_for_everyone()
    return last_complete_checkpoint(checkpoints)


def refuse_changes(before: dict, now: dict) -> None:
    """Raise AlpacaError that shows what differs, among what changes the result, between two training records."""
    changed = [key for key in now if key not in FREE and before.get(key) != now[key]]
    if changed:
        changes = "; ".join(f"{key} {before.get(key)} -> {now[key]}" for key in changed)
        what = f"This run's checkpoints were made with other settings ({changes})"
        remedy = "go back to those, take another `run`, or set `resume = False` to start over"
        raise AlpacaError(f"{what}: {remedy}.", "other-settings")


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
        "target_modules": sorted(lora.target_modules),
        **{name: getattr(lora, name) for name in LORA},
        **{name: getattr(args, name) for name in ARGUMENTS},
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "micro_batch_size": args.train_batch_size,
        "base": content_hash(locate(data["model"]), "*.safetensors") or None,  # on the Hub, the revision tells
        "dtype": str(trainer.model.get_base_model().dtype).removeprefix("torch."),
        "processes": processes(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": f"{device}, {torch.get_num_threads()} threads",
        "commit": _commit(),
    }
    return json.loads(json.dumps(record, default=str))  # as it will be read back


def _commit() -> str | None:
    if not (PACKAGE.parent / ".git").exists():
        return None  # git would take any repository around
    git = ["git", "-C", str(PACKAGE), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow disk
        return None


def processes() -> int:
    """Return how many processes train together, as torchrun told each of them before it began."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Return whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def _checkpoints(folder: Path) -> list[Path]:
    """Return Trainer's own checkpoints in the folder, the newest first; a copy or `checkpoint-best` is not its."""
    named = (re.fullmatch("checkpoint-([1-9][0-9]*)", path.name) for path in folder.glob("checkpoint-*"))
    steps = sorted((int(match[1]) for match in named if match), reverse=True)
    return [folder / f"checkpoint-{step}" for step in steps]
