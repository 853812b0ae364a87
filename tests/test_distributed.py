"""Two processes train as one and resume, and say once what is wrong: gloo on the CPU, by torchrun."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support import ENVIRONMENT, PROJECT, TRAIN_AND_DIE
from support.runs import history, prepare_run

from alpaca_helpers import checkpoints, models, training
from alpaca_helpers.lora import WEIGHTS

pytestmark = pytest.mark.nightly

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ON_CPU = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
IN_FLOAT32 = """
import torch
from alpaca_helpers import models, training
models.base_dtype = lambda: torch.float32  # on every processor
training.main()
"""


def torchrun(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([*TORCHRUN, *command], env=ON_CPU, cwd=PROJECT, capture_output=True, text=True)


def test_two_processes_train_as_one_and_resume_after_one_is_killed(tmp_path, monkeypatch):
    """Without dropout; 44 rows, so that the last batch of an epoch is filled up."""
    monkeypatch.setattr(models, "base_dtype", lambda: torch.float32)
    one, two = tmp_path / "one", tmp_path / "two"
    settings = prepare_run(one, micro_batch_size=4, lora_dropout=0.0)
    shutil.copytree(one, two)
    training.finetune(one, **settings)
    killed = torchrun(str(TRAIN_AND_DIE), str(two), "10", "step:1")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert not (two / "adapter").exists()
    assert checkpoints.last_complete_checkpoint(two / "checkpoints").name == "checkpoint-9"
    (tmp_path / "train.py").write_text(IN_FLOAT32)
    flags = [text for name, value in settings.items() for text in ("-p", name, f"{value:g}")]
    again = torchrun(str(tmp_path / "train.py"), str(two), *flags)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("Going on after step 9 of 24") == 1
    assert json.loads((two / "manifest.json").read_text())["training"]["processes"] == 2
    losses = ([entry["loss"] for entry in history(folder) if "loss" in entry] for folder in (two, one))
    assert next(losses) == pytest.approx(next(losses), rel=1e-4)
    saved, wanted = (load_file(folder / "adapter" / WEIGHTS) for folder in (two, one))
    assert saved.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(saved[name], wanted[name], atol=1e-4, rtol=1e-3)


def test_a_refusal_is_printed_once_and_names_the_parameter(tmp_path):
    prepare_run(tmp_path)
    for name, value, sentence in (
        ("batch_size", "9", "A batch of 9 rows cannot be shared by 2 processes: choose a `batch_size`"),
        ("lora_dropout", "1", "The parameter `lora_dropout` is '1'"),
    ):
        failed = torchrun("-m", "alpaca_helpers.training", str(tmp_path), "-p", name, value)
        assert failed.returncode != 0 and failed.stderr.count(sentence) == 1 and "AlpacaError" not in failed.stderr


FEW_ROWS = """
import sys
from pathlib import Path
from support.runs import notebook_03
trainer = notebook_03(Path(sys.argv[1]), "trainer", num_train_epochs=2)
seen, step = [], trainer.training_step
trainer.training_step = lambda model, inputs, *more: seen.append(len(inputs["labels"])) or step(model, inputs, *more)
trainer.train()
print(f"\\nsteps {trainer.state.global_step} rows {seen} of {trainer.batch_size}", flush=True)
"""


def test_a_batch_larger_than_the_data_is_shared_by_the_devices_and_no_more(tmp_path):
    prepare_run(tmp_path, rows=5)
    (tmp_path / "train.py").write_text(FEW_ROWS)
    done = torchrun(str(tmp_path / "train.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps 2 rows [3, 3] of 6") == 2
