"""Several processes: `python -m pytest tests/test_distributed.py`. Two gloo processes on the CPU, by torchrun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import PROJECT, TRAIN_AND_DIE
from support.runs import prepare_run

from alpaca_helpers import checkpoints, training
from alpaca_helpers.lora import WEIGHTS

pytestmark = pytest.mark.nightly

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")]),
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
}


def torchrun(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*TORCHRUN, *command], env=ENVIRONMENT, cwd=PROJECT, capture_output=True, text=True, timeout=300
    )


def losses(folder: Path) -> list[float]:
    state = json.loads(
        (checkpoints.last_complete_checkpoint(folder / "checkpoints") / "trainer_state.json").read_text()
    )
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run trained by one process, without dropout; 44 rows, so that the last batch of an epoch is filled up."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    settings = prepare_run(folder, micro_batch_size=4, lora_dropout=0.0)
    training.finetune(folder, **settings)
    return folder


def same_training(folder: Path, wanted: Path) -> None:
    assert losses(folder) == pytest.approx(losses(wanted), rel=1e-4)
    saved, one = (load_file(where / "adapter" / WEIGHTS) for where in (folder, wanted))
    assert saved.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(saved[name], one[name], atol=1e-4, rtol=1e-3)


def test_two_processes_train_as_one_and_resume_after_one_is_killed(run, tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "adapter", "base"))
    killed = torchrun(str(TRAIN_AND_DIE), str(folder), "10", "step:1")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert not (folder / "adapter").exists()
    assert checkpoints.last_complete_checkpoint(folder / "checkpoints").name == "checkpoint-9"
    settings = ["--num-train-epochs", "4", "--batch-size", "8", "--micro-batch-size", "4", "--lora-dropout", "0"]
    again = torchrun("-m", "alpaca_helpers.training", str(folder), *settings)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("Going on after step 9 of 24.") == 1
    same_training(folder, run)
    assert json.loads((folder / "manifest.json").read_text())["training"]["processes"] == 2


def test_a_refusal_is_printed_once_and_names_the_commands_own_flags(run):
    failed = torchrun("-m", "alpaca_helpers.training", str(run), "--batch-size", "9")
    assert failed.returncode != 0
    sentence = "A batch of 9 rows cannot be shared by 2 processes: choose a --batch-size that 2 divides."
    assert failed.stderr.count(sentence) == 1 and "AlpacaError" not in failed.stderr
    failed = torchrun("-m", "alpaca_helpers.training", str(run), "--lora-dropout", "1")
    assert failed.stderr.count("The parameter `lora_dropout` is '1'") == 1
