"""Two processes on a run, folders that cannot be written, interrupts in training: `pytest tests/test_faults_runs.py`.

Killed trainings, broken checkpoints and full disks are in tests/test_checkpoints.py.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import PROJECT
from tiny_run import prepare_run
from transformers import TrainerCallback

from alpaca_helpers import AlpacaError, training
from alpaca_helpers.runs import (
    atomic_folder,
    lock_run,
    read_manifest,
    read_record,
    run_folder,
    write_json,
    write_record,
)

pytestmark = pytest.mark.slow

HOLD = """
import sys, time
from pathlib import Path
from alpaca_helpers.runs import lock_run
with lock_run(Path(sys.argv[1])):
    print("at it", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path):
    """Another process that is at the training of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=PROJECT)
    assert process.stdout.readline() == b"at it\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_by_name_and_let_in_when_the_first_is_killed(other_process, tmp_path):
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    settings = prepare_run(tmp_path, rows=8)
    before = (tmp_path / "manifest.json").read_text()
    with pytest.raises(AlpacaError, match=f"Another process is training in the run {tmp_path}") as refused:
        training.finetune(tmp_path, resume=False, **settings)
    assert refused.value.code == "run-locked"
    assert (tmp_path / "checkpoints" / "checkpoint-3").is_dir() and (tmp_path / "manifest.json").read_text() == before
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    with lock_run(tmp_path):
        pass


def test_an_adapter_of_other_rows_than_the_runs_is_refused(tmp_path):
    with pytest.raises(AlpacaError, match="has no data: run notebook 02_dataset_and_tokenizer"):
        read_record(tmp_path, "data")
    write_record(tmp_path, "data", {"fingerprint": "a"})
    with pytest.raises(AlpacaError, match="has no training: run notebook 03_lora_finetuning"):
        read_record(tmp_path, "training")
    write_record(tmp_path, "training", {"fingerprint": "a", "seed": 1})
    assert read_record(tmp_path, "training")["seed"] == 1
    write_record(tmp_path, "data", {"fingerprint": "b"})
    with pytest.raises(AlpacaError, match="trained on other rows than the run's data"):
        read_record(tmp_path, "training")


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
