"""Checkpoints that are whole or not counted, and trainings that go on only as what they were."""

import json
import os
import platform
import shutil
import subprocess
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed
from transformers import TrainerCallback

from . import PACKAGE, AlpacaError, locate
from .models import base_dtype
from .profiles import Profile
from .runs import content_hash, lock_run, read_manifest, read_record, verify_checksums, write_checksums, write_record


class CompleteCheckpoints(TrainerCallback):
    """Marks each checkpoint as complete, once all processes have written their files."""

    def on_save(self, args, state, control, **named) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            write_checksums(folder)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of the run that is whole, or None; warn of each newer one that is not."""
    for checkpoint in sorted((folder / "checkpoints").glob("checkpoint-*"), key=_step, reverse=True):
        if not (wrong := verify_checksums(checkpoint)):
            return checkpoint
        warnings.warn(f"{checkpoint.name} is not used: {wrong}.", stacklevel=2)
    return None


def resume_point(folder: Path, settings: Profile, recipe: str, resume: bool = True) -> Path | None:
    """Record what makes this training, and return the checkpoint to go on from; None: from the beginning.

    Other versions, another machine and so perhaps `dtype`, `micro_batch_size` or number of processes change rounding
    and the draws of dropout alone, so a training may go on under them.

    Args:
        resume: False forgets the run's checkpoints.

    Raises AlpacaError that shows the differences if the checkpoints were made by settings that give another result,
    and if another process is training this run.
    """
    if is_main_process():
        with lock_run(folder):
            now = training_record(folder, settings, recipe)
            if not resume:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if any((folder / "checkpoints").glob("checkpoint-*")):
                before = read_manifest(folder).get("training", {})
                refuse_changes(before, now)
                now["earlier"] = made_elsewhere(before, now)
            write_record(folder, "training", now)
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
    place = {name: before.get(name) for name in ("versions", "hardware", "dtype", "commit", "processes")}
    return before.get("earlier", []) + [place] * any(now[name] != value for name, value in place.items())


def refuse_changes(before: dict, now: dict) -> None:
    """Raise AlpacaError that shows what differs, among what changes the result, between two training records."""
    free = {"name", "dataset", "heldout", "micro_batch_size", "processes", "versions", "hardware", "dtype", "commit"}
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
    git = ["git", "-C", str(PACKAGE), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow disk
        commit = None
    return {
        **json.loads(json.dumps(asdict(settings))),  # as it will be read back
        "recipe": recipe,
        "fingerprint": read_record(folder, "data")["fingerprint"],
        "base": content_hash(locate(settings.model), "*.safetensors") or None,  # on the Hub, the revision tells
        "dtype": str(base_dtype()).removeprefix("torch."),
        "processes": processes(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": f"{device}, {torch.get_num_threads()} threads",
        "commit": commit,
    }


def processes() -> int:
    """Return how many processes train together, as torchrun told each of them before it began."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Return whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
