"""Interrupted trainings: `python -m pytest tests/test_checkpoints.py`. Processes are killed for real."""

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import PROJECT, TRAIN_AND_DIE
from support.runs import prepare_run, save_adapter, tiny_gpt2

from alpaca_helpers import AlpacaError, checkpoints, training
from alpaca_helpers.files import check_disk_space, write_checksums
from alpaca_helpers.lora import WEIGHTS
from alpaca_helpers.runs import read_manifest, write_record

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])}


def copy_run(run: Path, to: Path) -> Path:
    """A copy of a run's prepared data, without its training."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "adapter", "base"))
    return to


def kill_training(folder: Path, step: int, place: str) -> None:
    """Train the prepared run in a process that is killed there."""
    command = [sys.executable, str(TRAIN_AND_DIE), str(folder), str(step), place]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def same_training(folder: Path, whole: Path) -> bool:
    """Whether two runs have the same losses and the same adapter, bit for bit."""
    saved, wanted = (load_file(where / "adapter" / WEIGHTS) for where in (folder, whole))
    same = saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)
    return same and history(folder) == history(whole)


def resume_point(folder: Path, resume: bool = True, **settings):
    """The checkpoint that a training of the run with these settings would go on from."""
    return training.resume_point(folder, training.make_trainer(folder, **settings), resume)


def history(folder: Path) -> list[dict]:
    """The losses by step, from the newest checkpoint, without timings."""
    state = json.loads(
        (checkpoints.last_complete_checkpoint(folder / "checkpoints") / "trainer_state.json").read_text()
    )
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [{name: entry[name] for name in kept if name in entry} for entry in state["log_history"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run trained without interruption, dropout included: 24 steps, 6 an epoch, a checkpoint each third step."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    settings = prepare_run(folder, micro_batch_size=4)
    training.finetune(folder, **settings)
    return folder, settings


@pytest.mark.integration
@pytest.mark.parametrize(
    "step, place, goes_on_from",
    [
        (10, "step", 9),  # in mid-epoch
        (15, "optimizer.pt", 12),  # inside the writing of a checkpoint, in mid-epoch
        (3, "adapter_model.safetensors", 0),  # inside the writing of the first one
    ],
)
def test_a_killed_training_resumes_to_the_same_losses_and_adapter_bit_for_bit(step, place, goes_on_from, run, tmp_path):
    whole, settings = run
    folder = copy_run(whole, tmp_path / "run")
    kill_training(folder, step, place)
    assert not (folder / "adapter").exists()
    if place == "step":
        found = checkpoints.last_complete_checkpoint(folder / "checkpoints")
    else:
        with pytest.warns(UserWarning, match=f"checkpoint-{step} is not used: its writing was cut"):
            found = checkpoints.last_complete_checkpoint(folder / "checkpoints")
    assert (int(found.name.split("-")[1]) if found else 0) == goes_on_from
    training.finetune(folder, **settings)
    assert same_training(folder, whole)


@pytest.mark.integration
def test_a_killed_run_goes_on_from_another_folder_on_another_machine(run, tmp_path, monkeypatch):
    whole, settings = run
    kill_training(copy_run(whole, tmp_path / "run"), 10, "step")
    moved = tmp_path / "drive" / "of somebody"
    moved.parent.mkdir()
    shutil.move(tmp_path / "run", moved)
    monkeypatch.setattr(platform, "node", lambda: "another-machine")
    monkeypatch.setattr(platform, "machine", lambda: "another kind")
    training.finetune(moved, **settings)
    assert same_training(moved, whole)
    record = read_manifest(moved)["adapter"]
    assert record["hardware"].startswith("another kind") and len(record["earlier"]) == 1


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_broken_checkpoint_is_named_and_the_one_before_it_is_taken(name, fault, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0] / "checkpoints", folder / "checkpoints")
    assert checkpoints.last_complete_checkpoint(folder / "checkpoints").name == "checkpoint-24"
    broken = folder / "checkpoints" / "checkpoint-24" / name
    if fault == "missing":
        broken.unlink()
    else:
        content = bytearray(broken.read_bytes())
        content[len(content) // 2] ^= 1
        broken.write_bytes(content)
    with pytest.warns(UserWarning, match=f"checkpoint-24 is not used: {name} is {fault}"):
        assert checkpoints.last_complete_checkpoint(folder / "checkpoints").name == "checkpoint-21"


def test_a_run_without_checkpoints_begins_at_the_beginning(tmp_path):
    assert checkpoints.last_complete_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize(
    "change, shown",
    [
        ({"learning_rate": 1e-4}, "learning_rate 0.003 -> 0.0001"),
        ({"lora_rank": 4, "seed": 1}, "seed 0 -> 1; lora_rank 8 -> 4"),
        ({"batch_size": 16}, "batch_size 8 -> 16"),
    ],
)
def test_resuming_with_other_settings_is_refused_and_the_difference_shown(change, shown, run):
    folder, settings = run
    before = (folder / "manifest.json").read_text()
    with pytest.raises(AlpacaError, match=f"other settings \\({shown}\\): .* set `resume = False`"):
        resume_point(folder, **settings | change)
    assert (folder / "manifest.json").read_text() == before


def test_other_data_under_the_same_settings_are_refused(run, tmp_path):
    folder, settings = tmp_path / "run", run[1]
    shutil.copytree(run[0], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"]["fingerprint"] = "other"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AlpacaError, match="fingerprint .* -> other"):
        resume_point(folder, **settings)


def change_manifest(folder: Path, **changes) -> None:
    """Change what the manifest says of data and training."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = {part: record | changes for part, record in manifest.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_another_recipe_is_refused(run, tmp_path):
    folder, settings = tmp_path / "run", run[1]
    shutil.copytree(run[0], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"]["recipe"] = "document"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AlpacaError, match="recipe answers -> document"):
        resume_point(folder, **settings)


def test_what_is_edited_in_the_objects_is_what_counts(run, tmp_path):
    """A value changed in a cell, not among the parameters: the record is made from what trains."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    trainer = training.make_trainer(folder, **run[1])
    trainer.args.weight_decay = 0.1
    with pytest.raises(AlpacaError, match=r"\(weight_decay 0.0 -> 0.1\)"):
        training.resume_point(folder, trainer)


def test_another_base_at_the_same_place_is_refused(run, tmp_path):
    folder, settings = tmp_path / "run", run[1]
    shutil.copytree(run[0], folder)
    change_manifest(folder, model=str(folder / "base"))
    assert resume_point(folder, **settings)
    tiny_gpt2(initializer_range=0.3).save_pretrained(folder / "base")
    with pytest.raises(AlpacaError, match="base [0-9a-f]+ -> [0-9a-f]+"):
        resume_point(folder, **settings)


def test_another_kind_of_device_may_go_on_and_is_noted(run, tmp_path, monkeypatch):
    folder, settings = tmp_path / "run", run[1]
    shutil.copytree(run[0], folder)
    here, there = ("bfloat16", "float32") if training.base_dtype() == torch.bfloat16 else ("float32", "bfloat16")
    monkeypatch.setattr(training, "base_dtype", lambda: getattr(torch, there))
    assert resume_point(folder, **settings)
    record = json.loads((folder / "manifest.json").read_text())["training"]
    assert (record["dtype"], record["earlier"][0]["dtype"]) == (there, here)


def test_a_smaller_micro_batch_may_go_on_and_resume_false_starts_over(run, tmp_path):
    folder, settings = tmp_path / "run", run[1]
    shutil.copytree(run[0], folder)
    assert resume_point(folder, **settings | {"micro_batch_size": 2}).name == "checkpoint-24"
    assert resume_point(folder, **settings | {"seed": 1}, resume=False) is None
    assert not (folder / "checkpoints").exists() and (folder / "adapter").is_dir()


def test_checkpoints_that_are_not_trainers_are_left_alone(run, tmp_path):
    folder, settings = tmp_path / "run", run[1]
    shutil.copytree(run[0], folder)
    for name in ("checkpoint-best", "checkpoint-24 (copy)", "checkpoint-"):
        shutil.copytree(folder / "checkpoints" / "checkpoint-21", folder / "checkpoints" / name)
    assert resume_point(folder, **settings).name == "checkpoint-24"
    assert (folder / "checkpoints" / "checkpoint-best").is_dir()


@pytest.mark.parametrize("record", [None, [], "x"])
def test_checkpoints_without_a_record_of_their_settings_are_refused(record, run, tmp_path):
    folder, settings = tmp_path / "run", run[1]
    shutil.copytree(run[0], folder)
    write_record(folder, "training", record)
    with pytest.raises(AlpacaError) as refused:
        resume_point(folder, **settings)
    assert refused.value.code == "other-settings"


def test_no_pickle_of_a_checkpoint_is_executed(run, tmp_path):
    folder, settings = tmp_path / "run", run[1]
    shutil.copytree(run[0], folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-24")
    checkpoint = folder / "checkpoints" / "checkpoint-21"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": Trap()}, checkpoint / name)
    write_checksums(checkpoint)
    with pytest.raises(Exception, match="(?i)weights.only"):
        training.finetune(folder, **settings)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB (a tmpfs; where it may not be mounted, the test is the mocked one alone)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def adapter_of(rank: int):
    from peft import get_peft_model
    from support.runs import tiny_gpt2

    from alpaca_helpers.lora import lora_config

    return get_peft_model(tiny_gpt2(), lora_config(r=rank))


def test_a_disk_too_small_for_the_adapter_leaves_the_earlier_one_whole(small_disk, monkeypatch):
    from support.runs import byte_tokenizer

    monkeypatch.setattr("alpaca_helpers.lora.TOKENIZER_BYTES", 100_000)
    save_adapter(adapter_of(8), byte_tokenizer(), small_disk / "adapter")
    before = {path.name: path.read_bytes() for path in (small_disk / "adapter").iterdir()}
    with pytest.raises(AlpacaError, match=r"is full: 2\.\d MB are needed and [01]\.\d MB are free"):
        save_adapter(adapter_of(2000), byte_tokenizer(), small_disk / "adapter")
    assert {path.name: path.read_bytes() for path in (small_disk / "adapter").iterdir()} == before
    assert [path.name for path in small_disk.iterdir()] == ["adapter"]


def test_a_disk_that_fills_up_while_training_says_how_much_is_needed(small_disk, run):
    with check_disk_space(small_disk, needed=0):
        pass
    with pytest.raises(AlpacaError, match=r"is full: 0\.9 MB are needed and 0\.0 MB are free; make room"):
        with check_disk_space(small_disk, needed=900_000):
            torch.save(torch.zeros(1_000_000), small_disk / "optimizer.pt")


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device")]
)
def test_a_full_disk_while_saving_leaves_the_earlier_adapter_whole(failure, tmp_path, monkeypatch):
    from support.runs import byte_tokenizer

    model, tokenizer = adapter_of(8), byte_tokenizer()
    save_adapter(model, tokenizer, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def fail(part):
        (part / "tokenizer.json").write_text("half")
        raise failure

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(AlpacaError, match="MB are needed"):
        save_adapter(model, tokenizer, tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
