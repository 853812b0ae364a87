"""Two processes on a run, folders that cannot be written, interrupts in training: `pytest tests/test_faults_runs.py`.

Killed trainings, broken checkpoints and full disks are in tests/test_checkpoints.py.
"""

import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support import PROJECT
from support.runs import locked_elsewhere, prepare_run, record_adapter
from transformers import TrainerCallback

from alpaca_helpers import AlpacaError, training
from alpaca_helpers.files import atomic_folder, write_json
from alpaca_helpers.runs import artifact, lock_run, read_manifest, read_metrics, read_record, run_folder, write_record

pytestmark = pytest.mark.integration


def test_a_second_process_is_refused_by_name_and_let_in_when_the_first_is_killed(tmp_path):
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    settings = prepare_run(tmp_path, rows=8)
    before = (tmp_path / "manifest.json").read_text()
    with locked_elsewhere(tmp_path) as other:
        with pytest.raises(AlpacaError, match=f"Another process is writing to the run {tmp_path}") as refused:
            training.finetune(tmp_path, resume=False, **settings)
        assert refused.value.code == "run-locked"
        left = (tmp_path / "manifest.json").read_text()
        assert (tmp_path / "checkpoints" / "checkpoint-3").is_dir() and left == before
        other.send_signal(signal.SIGKILL)
        other.wait()
        with lock_run(tmp_path):
            pass


def test_what_a_process_starts_under_its_lock_may_write_too(tmp_path):
    inner = "import sys; from pathlib import Path; from alpaca_helpers.runs import lock_run\n"
    inner += "with lock_run(Path(sys.argv[1])): print('in')"
    command = [sys.executable, "-c", inner, str(tmp_path)]
    with lock_run(tmp_path), lock_run(tmp_path):
        assert subprocess.run(command, capture_output=True, text=True, cwd=PROJECT).stdout == "in\n"
    with locked_elsewhere(tmp_path):
        assert "AlpacaError" in subprocess.run(command, capture_output=True, text=True, cwd=PROJECT).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_a_disk_knows_no_locks_a_mark_of_another_machine_is_named_with_what_to_do(tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    mark = tmp_path / ".lock"
    with lock_run(tmp_path):
        written = mark.read_text()
        assert platform.node() in written
    mark.write_text(written.replace(platform.node(), "colab-1"))
    with pytest.raises(AlpacaError) as refused, lock_run(tmp_path):
        pass
    said = f"Another process on colab-1 is writing to the run {tmp_path}: wait for it to end, or take another `run`"
    assert str(refused.value) == f"{said} (if that machine is gone, delete {mark})."
    mark.unlink()
    with lock_run(tmp_path):
        pass


def data_record(**changes) -> dict:
    names = dict.fromkeys(("name", "model", "dataset", "recipe", "fingerprint"), "a")
    return names | {"max_length": 128, "seed": 0, "learning_rate": 3e-4, "num_train_epochs": 2} | changes


@pytest.fixture
def recorded(tmp_path):
    """A run's folder with data and an adapter made from them, each with its record."""
    for name, file in (("data", "rows.arrow"), ("adapter", "adapter_model.safetensors")):
        with atomic_folder(tmp_path / name) as part:
            (part / file).write_text(name)
    write_record(tmp_path, "data", data_record())
    record_adapter(tmp_path)
    return tmp_path


def code_of(call, *given) -> str:
    with pytest.raises(AlpacaError) as raised:
        call(*given)
    assert "\n" not in str(raised.value)
    return raised.value.code


def test_a_record_is_of_the_bytes_that_are_there(recorded):
    assert read_record(recorded, "data")["seed"] == 0 and read_record(recorded, "adapter")["lora_rank"] == 8
    write_record(recorded, "data", data_record(fingerprint="b"))
    assert code_of(read_record, recorded, "adapter") == "other-rows"
    write_record(recorded, "data", data_record())
    with atomic_folder(recorded / "adapter") as part:
        (part / "adapter_model.safetensors").write_text("of a later training")
    assert code_of(read_record, recorded, "adapter") == "other-adapter"


def test_an_unfinished_training_leaves_the_earlier_adapter_with_its_own_record(recorded):
    write_record(recorded, "training", {"lora_rank": 1})
    assert read_record(recorded, "adapter")["lora_rank"] == 8


@pytest.mark.parametrize("record", [None, [], "x", 3])
def test_no_record_is_a_sentence(recorded, record):
    write_record(recorded, "data", record)
    assert code_of(read_record, recorded, "data") == "no-artifact"


@pytest.mark.parametrize("changes", [{"recipe": None}, {"max_length": "128"}, {"fingerprint": ["a"]}])
def test_a_record_of_another_version_is_a_sentence(recorded, changes):
    write_record(recorded, "data", data_record(**changes))
    assert code_of(read_record, recorded, "data") == "manifest-version"
    lacking = data_record()
    del lacking[next(iter(changes))]
    write_record(recorded, "data", lacking)
    assert code_of(read_record, recorded, "data") == "manifest-version"


@pytest.mark.parametrize("damage", ["cut", "gone", "without"])
def test_damaged_data_are_noticed_where_they_are_read(recorded, damage):
    assert artifact(recorded, "data").is_dir()
    if damage == "cut":
        (recorded / "data" / "rows.arrow").write_text("dat")
    else:
        (recorded / "data" / {"gone": "rows.arrow", "without": "checksums.json"}[damage]).unlink()
    assert code_of(artifact, recorded, "data") == "no-artifact"


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "{}", '{"base": {}, "tuned": null}'])
def test_broken_metrics_are_a_sentence(content, tmp_path):
    (tmp_path / "metrics.json").write_text(content)
    assert code_of(read_metrics, tmp_path) in ("json-broken", "manifest-version")


# Folders that are no run's


def test_a_folder_with_other_files_is_no_run(tmp_path):
    for name in ("papers", "site", "source"):
        (tmp_path / name).mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("mine")
    (tmp_path / "site" / "manifest.json").write_text('{"name": "a web app"}')
    shutil.copy(PROJECT / "notebooks" / "01_base_model.ipynb", tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    for name in ("papers", "site", "source"):
        assert code_of(run_folder, f"{tmp_path}/{name}") == "not-a-run"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_projects_own_folders_are_no_runs(monkeypatch):
    monkeypatch.chdir(PROJECT)
    for run in ("notebooks/", "./notebooks/fr", str(PROJECT / "alpaca_helpers"), ".", "runs/../tests"):
        assert code_of(run_folder, run) == "not-a-run"


def test_a_new_folder_and_a_runs_own_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "batch").mkdir()
    executed = '{"metadata": {"papermill": {}}, "cells": []}'  # papermill writes before the first cell runs
    (tmp_path / "batch" / "01_base_model.ipynb").write_text(executed)
    for name in ("empty", "batch", "new"):
        for _ in range(2):
            assert (run_folder(f"{tmp_path}/{name}") / "pictures").is_dir()


def test_a_folder_cut_between_its_two_renames_is_put_back(tmp_path):
    (tmp_path / "adapter.old").mkdir()
    (tmp_path / "adapter.old" / "weights").write_text("whole")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "adapter") as part:
        (part / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "adapter" / "weights").read_text() == "whole"


def test_the_lock_is_let_go_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock_run(tmp_path):
        raise KeyboardInterrupt
    with lock_run(tmp_path):
        pass


class InterruptAt(TrainerCallback):
    """Sends a real SIGINT after a step, as Ctrl-C and Jupyter's stop button do."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **named):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_in_mid_training_leaves_a_run_that_goes_on(tmp_path, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    settings = prepare_run(tmp_path, rows=16, num_train_epochs=5)
    interrupted = training.make_trainer(tmp_path, **settings)
    interrupted.add_callback(InterruptAt(7))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train(training.resume_point(tmp_path, interrupted))
    again = training.make_trainer(tmp_path, **settings)
    found = training.resume_point(tmp_path, again)
    assert found.name == "checkpoint-6"
    again.train(found)
    assert again.state.global_step == again.state.max_steps == 10


@pytest.fixture
def read_only():
    """A run's folder that this process may read and not write, root or not."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place) / "run"
        folder.mkdir()
        write_record(folder, "data", {"recipe": "answers"})
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield folder
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_run_folder_that_cannot_be_written_is_one_sentence(read_only):
    (read_only / "manifest.json").read_text()
    for write in (
        lambda: write_record(read_only, "training", {}),
        lambda: atomic_folder(read_only / "adapter").__enter__(),
        lambda: lock_run(read_only).__enter__(),
        lambda: run_folder(str(read_only / "new")),
    ):
        with pytest.raises(AlpacaError, match=f"{read_only}.*Permission denied.*another `run`") as raised:
            write()
        assert "\n" not in str(raised.value)
    assert [path.name for path in read_only.iterdir()] == ["manifest.json"]
    assert read_manifest(read_only) == {"data": {"recipe": "answers"}}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, a disk that is always full")
def test_a_manifest_on_a_full_disk_stays_the_old_one(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, {"n": 1})
    (tmp_path / "manifest.json.part").symlink_to("/dev/full")
    with pytest.raises(AlpacaError, match="cannot be written .No space left on device"):
        write_json(path, {"n": 2})
    assert read_manifest(tmp_path) == {"n": 1}


@pytest.mark.parametrize("content", [b"", b'{"data": {"re', bytes(20), b"\xff\xfe", b"[1]"])
def test_a_broken_manifest_is_one_sentence(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(AlpacaError, match="manifest.json is broken .*run notebook 02 again"):
        read_manifest(tmp_path)
