"""Train a prepared run and be killed by SIGKILL on the way: `python train_and_die.py FOLDER STEP PLACE`.

PLACE is `step`: right after optimizer step STEP, all processes or, as `step:1`, the one of that rank; or the name of a
checkpoint's file: while it is being written, half of it on disk.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from alpaca_helpers import models, training

folder, step, place = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if place in ("step", f"step:{os.environ.get('RANK')}") and state.global_step == step:
            die()


class DyingTrainer(training.AnswerTrainer):
    def __init__(self, *arguments, **kwargs):
        super().__init__(*arguments, **kwargs)
        self.add_callback(DieAtStep())

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if not place.startswith("step") and output_dir.endswith(f"-{step}"):
            cut = Path(output_dir) / place
            cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
            die()


training.AnswerTrainer = DyingTrainer
models.base_dtype = lambda: torch.float32  # on every processor, as in the test that goes on
training.finetune(folder, **json.loads((folder / "settings.json").read_text()))
