"""Interrupted trainings resume bit for bit, under the same settings alone; processes are killed for real."""

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from support import ENVIRONMENT, TRAIN_AND_DIE, contents
from support.models import with_lora
from support.runs import byte_tokenizer, history, notebook_03, prepare_run, save_adapter, tiny_gpt2

from alpaca_helpers import AlpacaError, checkpoints, models, training
from alpaca_helpers.files import atomic_folder, check_disk_space, verify_checksums, write_checksums
from alpaca_helpers.lora import WEIGHTS
from alpaca_helpers.run import Run

FOREIGN = ("checkpoint-best", "checkpoint-1-mine", "checkpoint-3 (copy)", "checkpoint-03", "checkpoint-")


@pytest.fixture(scope="module", autouse=True)
def float32():
    """The base is held alike on every processor, in the processes that are killed too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(models, "base_dtype", lambda: torch.float32)
        yield


@pytest.fixture(scope="module")
def whole(float32, tmp_path_factory):
    """A run trained without interruption, dropout included: 24 steps, 6 an epoch, a checkpoint each third step."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    settings = prepare_run(folder, micro_batch_size=4)
    for name in FOREIGN:
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / WEIGHTS).write_text("mine")
    training.finetune(folder, **settings)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def untrained(whole, tmp_path):
    """A copy of what was prepared, without its training."""
    return shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "adapter", "base"))


def settings_of(folder):
    return json.loads((folder / "settings.json").read_text())


def resume_point(folder: Path, resume: bool = True, **changes):
    """The checkpoint that a training of the run would go on from, with these settings changed."""
    trainer = notebook_03(folder, "trainer", **settings_of(folder) | changes)
    return checkpoints.resume_point(trainer.run, trainer, resume)


def assert_same_training(folder: Path, whole: Path) -> None:
    """Check that two runs have the same losses and the same adapter, bit for bit."""
    saved, wanted = (load_file(where / "adapter" / WEIGHTS) for where in (folder, whole))
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)
    assert history(folder) == history(whole)


@pytest.mark.integration
@pytest.mark.parametrize("step, place, goes_on_from", [(10, "step", 9), (15, "optimizer.pt", 12)])
def test_a_killed_training_resumes_bit_for_bit_in_another_folder_on_another_machine(
    step, place, goes_on_from, whole, untrained, tmp_path, monkeypatch
):
    """Killed in mid-epoch, in a step and inside the writing of a checkpoint."""
    command = [sys.executable, str(TRAIN_AND_DIE), str(untrained), str(step), place]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (untrained / "adapter").exists()
    moved = tmp_path / "drive" / "of somebody"
    moved.parent.mkdir()
    shutil.move(untrained, moved)
    monkeypatch.setattr(platform, "node", lambda: "another-machine")
    monkeypatch.setattr(platform, "machine", lambda: "another kind")
    found = checkpoints.last_complete_checkpoint(moved / "checkpoints")  # without a warning: the cut one lies apart
    assert (moved / "checkpoints" / checkpoints.PART).exists() == (place != "step")
    assert found.name == f"checkpoint-{goes_on_from}"
    training.finetune(moved, **settings_of(moved))
    assert_same_training(moved, whole)
    assert Run(moved).record("adapter")["hardware"].startswith("another kind")


@pytest.mark.integration
def test_a_training_whose_first_checkpoint_was_cut_begins_at_the_beginning(whole, untrained):
    cut = untrained / "checkpoints" / checkpoints.PART / "checkpoint-3"
    shutil.copytree(whole / "checkpoints" / "checkpoint-21", cut)
    (cut / "optimizer.pt").write_bytes((cut / "optimizer.pt").read_bytes()[:1000])
    training.finetune(untrained, **settings_of(untrained))
    assert_same_training(untrained, whole)


def test_a_broken_checkpoint_is_named_and_the_one_before_it_is_taken(run):
    folder = run / "checkpoints"
    assert checkpoints.last_complete_checkpoint(folder / "none") is None
    for name in (WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        broken = folder / "checkpoint-24" / name
        content = broken.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for fault, now in (("missing", None), ("damaged", flipped)):
            broken.unlink() if now is None else broken.write_bytes(now)
            with pytest.warns(UserWarning, match=f"checkpoint-24 is not used: {name} is {fault}"):
                assert checkpoints.last_complete_checkpoint(folder).name == "checkpoint-21"
        broken.write_bytes(content)
    shutil.copytree(folder / "checkpoint-21", folder / "checkpoint-25 (copy)")
    assert resume_point(run).name == "checkpoint-24"


def test_checkpoints_that_are_not_trainers_are_left_alone(run):
    kept = {folder.name for folder in (run / "checkpoints").iterdir()}
    assert kept == {*FOREIGN, "checkpoint-21", "checkpoint-24"}  # after `save_total_limit`
    (run / "checkpoints" / "notes.txt").write_text("mine")
    assert resume_point(run, resume=False) is None
    assert {folder.name for folder in (run / "checkpoints").iterdir()} == {*FOREIGN, "notes.txt"}


def test_a_file_that_is_not_recorded_stops_the_training_before_anything_is_removed(run):
    for place in ("checkpoints/checkpoint-21/notes.txt", "adapter/notes.txt", "checkpoints/checkpoint-30/mine.bin"):
        (run / place).parent.mkdir(exist_ok=True)
        (run / place).write_text("mine")
        before = contents(run)
        for resume in (True, False):
            with pytest.raises(AlpacaError, match=f"{place} is in the way"):
                resume_point(run, resume=resume)
            assert contents(run) == before
        (run / place).unlink()


def test_the_oldest_checkpoints_are_removed_unless_somebodys_file_is_in_them(tmp_path):
    for step in range(1, 7):
        part, newest = (folder / f"checkpoint-{step}" for folder in (tmp_path / checkpoints.PART, tmp_path))
        part.mkdir(parents=True)
        (part / "optimizer.pt").touch()
        checkpoints.finish_checkpoint(tmp_path, step, limit=2, best=1)
        assert verify_checksums(newest) == ""
        if step == 3:
            (newest / "notes.txt").write_text("mine")
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (1, 3, 5, 6)}


def test_a_removal_that_is_cut_leaves_no_checkpoint_in_part(run, monkeypatch):
    """It would be named as broken, and its files as somebody's, at each later training."""

    def cut(folder, *given, **kwargs):
        if file := next((path for path in Path(folder).glob("**/checksums.json")), None):
            file.unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        resume_point(run, resume=False)
    monkeypatch.undo()
    assert not list((run / "checkpoints").glob("checkpoint-2*"))
    assert resume_point(run) is None and not (run / "checkpoints" / checkpoints.PART).exists()


def test_the_best_checkpoint_is_kept_and_loaded_again(run):
    """As `load_best_model_at_end` asks for, and Trainer does: each loss here is worse than the first one."""
    trainer = notebook_03(run, "trainer", **settings_of(run))
    losses, evaluate = iter(range(1, 20)), trainer.evaluate
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "eval_loss"
    trainer.args.greater_is_better = False
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_loss": next(losses)}
    trainer.train(resume_from_checkpoint=False)
    best = run / "checkpoints" / "checkpoint-3"
    assert trainer.state.best_model_checkpoint == str(best) and verify_checksums(best) == ""
    assert {path.name for path in best.parent.iterdir()} == {*FOREIGN, best.name, "checkpoint-21", "checkpoint-24"}
    saved, now = load_file(best / WEIGHTS), get_peft_model_state_dict(trainer.model)
    assert all(torch.equal(saved[name], now[name].cpu()) for name in saved)


def change_manifest(folder: Path, *parts: str, **changes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = {part: record | changes if part in parts else record for part, record in manifest.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder: Path, shown: str, **changes) -> None:
    before = (folder / "manifest.json").read_text()
    with pytest.raises(AlpacaError, match=rf"made with other settings.*\({shown}\): .*`resume = False`"):
        resume_point(folder, **changes)
    assert (folder / "manifest.json").read_text() == before


def test_resuming_with_other_settings_data_or_base_is_refused_and_the_difference_shown(run):
    refused(run, "learning_rate 0.003 -> 0.0001", learning_rate=1e-4)
    refused(run, "seed 0 -> 1; lora_rank 8 -> 4", lora_rank=4, seed=1)
    refused(run, "batch_size 8 -> 16", batch_size=16)
    manifest = (run / "manifest.json").read_text()
    for name, value in (("fingerprint", "other"), ("recipe", "document")):
        change_manifest(run, "data", **{name: value})
        refused(run, f"{name} .* -> {value}")
        (run / "manifest.json").write_text(manifest)
    change_manifest(run, "data", "training", model=str(run / "base"))
    assert resume_point(run)
    tiny_gpt2(initializer_range=0.3).save_pretrained(run / "base")  # another one at the same place
    refused(run, "base [0-9a-f]+ -> [0-9a-f]+")
    for record in (None, [1], "x", 3):
        Run(run).write_record("training", record)
        refused(run, ".*batch_size None -> 8.*")


def test_another_revision_of_a_base_on_the_hub_is_not_gone_on_with(run, monkeypatch):
    """Nobody named one, notebook 02 ran again, and the Hub's newest is another."""
    monkeypatch.setattr(models, "cached_folder", lambda *_: run / "base")
    change_manifest(run, "data", "training", model="owner/name", model_revision="1" * 40)
    change_manifest(run, "training", base=None)
    assert resume_point(run).name == "checkpoint-24"
    change_manifest(run, "data", model_revision="2" * 40)
    refused(run, "model_revision 1{40} -> 2{40}")


EDITED = [{"lr_scheduler_kwargs": {"min_lr": 1e-4}}, {"neftune_noise_alpha": 5.0}, {"weight_decay": 0.1}]
EDITED += [{"alpha_pattern": {"c_attn": 64}}, {"rank_pattern": {"c_attn": 2}}, {"layers_to_transform": [0]}]
EDITED += [{"exclude_modules": ["c_proj"]}]


@pytest.mark.parametrize("edited", EDITED, ids=str)
def test_what_changes_the_result_is_never_gone_on_with(edited, run):
    """A value changed in a cell, not among the parameters: the record is made from what trains."""
    trainer, (name, value) = notebook_03(run, "trainer", **settings_of(run)), *edited.items()
    lora = trainer.model.active_peft_config
    setattr(lora if hasattr(lora, name) else trainer.args, name, value)
    with pytest.raises(AlpacaError, match=rf"\({name} (None|{{}}|0.0) -> "):
        checkpoints.resume_point(trainer.run, trainer)
    change_manifest(run, "training", **{name: None})  # as an earlier version left it
    setattr(lora if hasattr(lora, name) else trainer.args, name, None)
    assert checkpoints.resume_point(trainer.run, trainer)


def test_a_pattern_of_layers_is_recorded_as_it_is(run):
    trainer = notebook_03(run, "trainer", **settings_of(run))
    trainer.model.active_peft_config.target_modules = r".*\.c_attn"
    assert checkpoints.training_record(trainer.run, trainer)["target_modules"] == r".*\.c_attn"


def test_a_training_by_hand_is_recorded_and_a_half_saved_adapter_replaces_nothing(run):
    """Trainer's own `train()`, and a training that starts over after one that went on from a checkpoint."""
    trainer, before = notebook_03(run, "trainer", **settings_of(run)), verify_checksums(run / "adapter")
    trainer.args.weight_decay = 0.1
    assert trainer.train().global_step == 24
    for saved in ((), (trainer.model,)):
        with pytest.raises(AlpacaError, match="not saved to .*: `save_pretrained` of both"):
            with training.save_adapter(trainer) as part:
                for thing in saved:
                    thing.save_pretrained(part)
        assert verify_checksums(run / "adapter") == before == ""
    with training.save_adapter(trainer) as part:
        trainer.model.save_pretrained(part)
        byte_tokenizer().save_pretrained(part)
    assert Run(run).record("adapter")["weight_decay"] == 0.1
    trainer.train(run / "checkpoints" / "checkpoint-21")
    trainer.train()
    assert trainer.first_step == 0


@pytest.mark.parametrize("here, there", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_what_changes_rounding_alone_may_go_on_and_resume_false_starts_over(here, there, run, monkeypatch):
    change_manifest(run, "training", dtype=here)
    monkeypatch.setattr(models, "base_dtype", lambda: getattr(torch, there))
    assert resume_point(run, micro_batch_size=2).name == "checkpoint-24"
    record = json.loads((run / "manifest.json").read_text())["training"]
    assert record["dtype"] == there
    assert resume_point(run, seed=1, resume=False) is None
    assert not list(run.glob("checkpoints/checkpoint-2*")) and (run / "adapter").is_dir()


def test_no_pickle_of_a_checkpoint_is_executed(run, tmp_path):
    shutil.rmtree(run / "checkpoints" / "checkpoint-24")
    checkpoint = run / "checkpoints" / "checkpoint-21"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": Trap()}, checkpoint / name)
    write_checksums(checkpoint)
    with pytest.raises(Exception, match="(?i)weights.only"):
        training.finetune(run, **settings_of(run))
    assert not (tmp_path / "executed").exists()


# Full disks


def test_a_disk_that_is_or_becomes_full_leaves_the_earlier_adapter_and_says_how_much_is_needed(tmp_path, monkeypatch):
    model, tokenizer, full = with_lora(tiny_gpt2()), byte_tokenizer(), "No space left on device"
    save_adapter(model, tokenizer, tmp_path / "adapter")
    before = contents(tmp_path)
    for failure in OSError(errno.ENOSPC, full), RuntimeError(full):

        def fail(part, failure=failure):
            (part / "tokenizer.json").write_text("half")
            raise failure

        monkeypatch.setattr(tokenizer, "save_pretrained", fail)
        with pytest.raises(AlpacaError, match="cannot be written .*MB are needed"):
            save_adapter(model, tokenizer, tmp_path / "adapter")
        assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["adapter"]
    disk = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda part: pytest.fail("begun without the room for it"))
    with pytest.raises(AlpacaError, match=r"5\.\d MB are needed, 1\.0 MB are free"):
        save_adapter(model, tokenizer, tmp_path / "adapter")
    with pytest.raises(AlpacaError, match=rf"{full}; 2\.0 MB are needed, 1\.0 MB are free"):
        Run.named(f"{tmp_path}/run")  # in the set-up cell
    assert contents(tmp_path) == before
    with pytest.raises(AlpacaError, match=r"0\.9 MB are needed, 0\.1 MB are free\): make room"):
        with check_disk_space(tmp_path, needed=900_000):
            disk.free = 100_000
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")  # torch's words
    with pytest.raises(AlpacaError, match=r"0\.1 MB are free\): make room"), atomic_folder(tmp_path / "data"):
        raise OSError(errno.ENOSPC, full)  # where nobody knows how much is needed
