"""Two processes on a run, artifacts of different trainings, folders that are no run's or cannot be written."""

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
from support import PROJECT, contents, refusal
from support.runs import locked_elsewhere, prepare_run, record_adapter

from alpaca_helpers import AlpacaError, files, pocket, training
from alpaca_helpers.files import atomic_folder, replace_file, replace_recorded, write_json
from alpaca_helpers.run import Run


def lock(folder):
    with Run(folder).lock():
        pass


@pytest.mark.integration
def test_a_second_process_is_refused_by_name_and_let_in_when_the_first_is_killed(tmp_path):
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    settings = prepare_run(tmp_path, rows=8)
    with locked_elsewhere(tmp_path) as other:
        before = contents(tmp_path)
        refused = refusal(training.finetune, tmp_path, resume=False, **settings)
        assert f"Another process is writing to the run {tmp_path}" in refused and contents(tmp_path) == before
        other.send_signal(signal.SIGKILL)
        other.wait()
        lock(tmp_path)


@pytest.mark.integration
def test_what_a_process_starts_under_its_lock_may_write_too_until_it_lets_go(tmp_path):
    inner = "import sys; from pathlib import Path; from alpaca_helpers.run import Run\n"
    inner += "with Run(Path(sys.argv[1])).lock(): print('in')"
    command = [sys.executable, "-c", inner, str(tmp_path)]
    with pytest.raises(KeyboardInterrupt), Run(tmp_path).lock(), Run(tmp_path).lock():
        assert subprocess.run(command, capture_output=True, text=True, cwd=PROJECT).stdout == "in\n"
        raise KeyboardInterrupt
    with locked_elsewhere(tmp_path):  # which an error has let in
        assert "AlpacaError" in subprocess.run(command, capture_output=True, text=True, cwd=PROJECT).stderr


def test_a_run_stays_locked_for_its_holder_through_another_runs_lock(tmp_path):
    first, second = (Run.named(f"{tmp_path}/{name}") for name in ("one", "two"))
    with first.lock():
        with second.lock(), first.lock(), second.lock():
            pass
        lock(first.folder)
        assert os.environ["ALPACA_LOCKED_RUN"].split() == [str(first.folder)]
    lock(second.folder)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_a_disk_knows_no_locks_a_mark_of_another_machine_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    mark = tmp_path / ".lock"
    with Run(tmp_path).lock():
        written = mark.read_text()
        assert platform.node() in written
    mark.write_text(written.replace(platform.node(), "colab-1"))
    refused = refusal(lock, tmp_path)
    assert "Another process is writing to the run" in refused and f"delete {mark}" in refused
    mark.unlink()
    lock(tmp_path)


def data_record(**changes) -> dict:
    names = dict.fromkeys(("name", "model", "dataset", "fingerprint"), "a") | {"recipe": "document"}
    return names | {"max_length": 128, "seed": 0, "learning_rate": 3e-4, "num_train_epochs": 2} | changes


@pytest.fixture
def recorded(tmp_path):
    """A run's folder with data and an adapter made from them, each with its record."""
    for name, file in (("data", "rows.arrow"), ("adapter", "adapter_model.safetensors")):
        with atomic_folder(tmp_path / name) as part:
            (part / file).write_text(name)
    Run(tmp_path).write_record("data", data_record())
    record_adapter(tmp_path)
    return tmp_path


def test_a_record_is_of_the_bytes_that_are_there(recorded):
    Run(recorded).write_record("training", {"lora_rank": 1})  # one that did not finish: the adapter is as it was
    assert Run(recorded).record("data")["seed"] == 0 and Run(recorded).record("adapter")["lora_rank"] == 8
    Run(recorded).write_record("data", data_record(fingerprint="b"))
    assert "The adapter in" in refusal(Run(recorded).record, "adapter")
    Run(recorded).write_record("data", data_record())
    with atomic_folder(recorded / "adapter") as part:
        (part / "adapter_model.safetensors").write_text("of a later training")
    assert "The adapter in" in refusal(Run(recorded).record, "adapter")


def test_no_record_or_one_of_another_version_is_a_sentence(recorded):
    changed = [data_record(**wrong) for wrong in ({"recipe": "new"}, {"max_length": "128"}, {"fingerprint": ["a"]})]
    lacking = [{name: value for name, value in data_record().items() if name != gone} for gone in ("recipe", "seed")]
    for record in (None, [], "x", 3, *changed, *lacking):
        Run(recorded).write_record("data", record)
        refused = refusal(Run(recorded).record, "data")
        assert "run notebook" in refused and "`data" in refused, record
        assert ("data" in Run(recorded).manifest()) == isinstance(record, dict)


def test_damaged_data_are_noticed_where_they_are_read(recorded):
    rows, checksums = recorded / "data" / "rows.arrow", recorded / "data" / "checksums.json"
    for damage in (lambda: rows.write_text("dat"), rows.unlink, checksums.unlink, lambda: shutil.rmtree(rows.parent)):
        damage()
        refused = refusal(Run(recorded).artifact, "data")
        assert "run notebook" in refused and "02_dataset_and_tokenizer" in refused


def test_broken_metrics_and_manifests_are_a_sentence(tmp_path):
    for content in (b"", b'{"base": {"re', bytes(20), b"\xff\xfe", b"[1]", b"null", b"[" * 100_000):
        for name, read in {"metrics.json": Run.metrics, "manifest.json": Run.manifest}.items():
            (tmp_path / name).write_bytes(content)
            refused = refusal(read, Run(tmp_path))
            assert "is broken" in refused and str(tmp_path / name) in refused, content
    for content in ("{}", '{"base": {}, "tuned": null}'):
        (tmp_path / "metrics.json").write_text(content)
        assert "is of another version" in refusal(Run(tmp_path).metrics)


def test_a_run_is_a_name_or_a_path_to_a_new_folder_or_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    paths = {"mine": "runs/mine", "./here": "here", "a/b": "a/b", "./empty": "empty"}
    for run, path in (paths | {f"{tmp_path}/elsewhere": "elsewhere"}).items():
        folder = tmp_path / path
        for _ in range(2):
            assert Run.named(run).folder == folder and (folder / "pictures").is_dir(), run
            (folder / "manifest.json").write_text("broken")  # it stays a run's
            (folder / "notes.txt").write_text("mine")


def test_a_new_run_that_is_cut_and_odd_names_are_a_run_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "write_text", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Run.named("./cut")
    monkeypatch.undo()
    Path(tmp_path / "mac").mkdir()
    (tmp_path / "mac" / ".DS_Store").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("cut", "mac"):
        assert Run.named(f"{tmp_path}/{name}").folder == tmp_path / name
    assert "cannot be written" in refusal(Run.named, f"{tmp_path}/loop")
    (tmp_path / "metrics.json").mkdir()
    assert "cannot be written" in refusal(write_json, tmp_path / "metrics.json", {})


def test_a_folder_that_is_not_marked_or_lies_in_the_package_is_no_run_and_stays_as_it_is(tmp_path, monkeypatch):
    foreign = {
        "papers/thesis.txt": "mine",
        "gallery/pictures/cat.png": "",
        "papermill/01_base_model.ipynb": '{"metadata": {"papermill": {}}, "cells": []}',
        "dataset/data/train.csv": "instruction,output",
    }
    manifests = ["{}", "[]", "null", "broken", '{"name": "a web app"}', '{"data": {"files": ["a.csv"]}}']
    manifests += ['{"data": ["a.csv"]}', '{"data": {}, "adapter": {}}']
    manifests += [json.dumps({"data": data_record()})]  # of version 0.2: only a mark makes a run
    foreign |= {f"site{number}/manifest.json": text for number, text in enumerate(manifests)}
    for path, content in foreign.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(content)
    copied = Path(shutil.copytree(pocket.DOCUMENT, tmp_path / "alpaca_helpers" / "document")).parent
    (copied / "__init__.py").write_text("")  # as where it is installed
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(PROJECT)
    own = ("notebooks/", "./notebooks/fr", str(PROJECT / "alpaca_helpers"), ".", "runs/../tests", str(pocket.DOCUMENT))
    own += ("./alpaca_helpers/new", f"{copied}/new", f"{copied}/document")
    for run in (*(f"{tmp_path}/{path.partition('/')[0]}" for path in foreign), *own):
        assert "take another `run`" in refusal(Run.named, run), run
    assert sorted(tmp_path.rglob("*")) == before and not (PROJECT / "alpaca_helpers" / "new").exists()


@pytest.mark.parametrize("name", ["data", "adapter", "merged"])
def test_a_file_that_is_not_recorded_stops_the_work_before_anything_is_removed(name, tmp_path):
    folder, backups = tmp_path / name, [tmp_path / f"{name}{end}" for end in (".old", ".part", ".bak")]
    for backup in backups:
        backup.mkdir()
        (backup / "weights").write_text("mine")
    for content in ("one", "two"):
        with atomic_folder(folder) as part:
            (part / "train").mkdir()
            (part / "train" / "weights").write_text(content)
        (folder / ".DS_Store").touch()  # of a system's file browser
    assert all((backup / "weights").read_text() == "mine" for backup in backups)
    damages = {
        "notes.txt": lambda: (folder / "notes.txt").write_text("mine"),
        "rows.json": lambda: (folder / "train" / "rows.json").write_text("mine"),
        "link": lambda: (folder / "link").symlink_to(backups[0]),
        "": lambda: (folder / "checksums.json").write_text("{}"),
        name: lambda: (shutil.rmtree(folder), folder.symlink_to(backups[0])),
    }
    for strange, damage in damages.items():
        damage()
        before = contents(tmp_path)
        refused = refusal(atomic_folder(folder).__enter__)
        assert "is in the way" in refused and f"/{strange}" in refused.split()[0]
        assert contents(tmp_path) == before
        for path in (folder / "notes.txt", folder / "train" / "rows.json", folder / "link"):
            path.unlink(missing_ok=True)


def test_a_single_file_replaces_only_what_is_recorded_beside_it(tmp_path):
    path, target = tmp_path / "pictures" / "losses.png", tmp_path / "target"
    for content in (b"one", b"two"):
        replace_recorded(path, content)
        assert path.read_bytes() == content
    path.unlink()
    replace_recorded(path, b"three")
    (path.parent / "mine.png").write_bytes(b"mine")
    (path.parent / "link.png").symlink_to(target)
    for name in ("mine.png", "link.png"):
        refused = refusal(replace_recorded, path.parent / name, b"four")
        assert "is in the way" in refused and name in refused
    assert (path.parent / "mine.png").read_bytes() == b"mine" and not target.exists()


def test_a_file_put_into_a_folder_while_it_is_made_again_stays(recorded):
    with pytest.raises(AlpacaError, match="notes.txt"), atomic_folder(recorded / "data"):
        (recorded / "data" / "notes.txt").write_text("mine")
    assert {path.name for path in (recorded / "data").iterdir()} == {"rows.arrow", "checksums.json", "notes.txt"}


def test_the_model_card_beside_an_adapter_is_ours(recorded):
    for name in ("adapter", "data"):
        replace_file(recorded / name / "README.md", b"written after the checksums")
    with atomic_folder(recorded / "adapter"):
        pass
    assert "README.md" in refusal(atomic_folder(recorded / "data").__enter__)


def test_checksums_of_nothing_or_of_somebody_are_not_whole(tmp_path):
    (tmp_path / "rows").write_text("rows")
    for content in ("{}", "[]", '{"rows": ""}', '{"rows": "a"}', '{"rows": 3}'):
        (tmp_path / "checksums.json").write_text(content)
        assert files.verify_checksums(tmp_path) == "its writing was cut", content
    files.write_checksums(tmp_path)
    assert files.verify_checksums(tmp_path) == ""


def test_a_folder_is_whole_or_the_earlier_one_also_after_a_cut_between_its_two_renames(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "adapter") as part:
        (part / "weights").write_text("whole")
    (tmp_path / "adapter").rename(tmp_path / ".alpaca-adapter.old")  # as such a cut leaves it
    for error in (OSError("disk full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_folder(tmp_path / "adapter") as part:
            (part / "weights").write_text("half")
            raise error
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        assert (tmp_path / "adapter" / "weights").read_text() == "whole"
    with atomic_folder(tmp_path / "adapter") as part:
        (part / "two").write_text("new")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"two", "checksums.json"}
    (tmp_path / "adapter").rename(tmp_path / "adapter.old")  # somebody's backup: it does not come back
    with atomic_folder(tmp_path / "adapter") as part:
        (part / "three").write_text("newer")
    assert (tmp_path / "adapter.old" / "two").exists() and not (tmp_path / "adapter" / "two").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, a disk that is always full")
def test_a_manifest_on_a_full_disk_stays_the_old_one(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, {"n": {}})
    with pytest.raises(TypeError):
        write_json(path, {"n": object()})
    (tmp_path / "manifest.json.part").write_text("mine")
    (tmp_path / ".alpaca-manifest.json.part").symlink_to("/dev/full")
    refused = refusal(write_json, path, {"n": 2})
    assert "cannot be written" in refused and os.strerror(errno.ENOSPC) in refused
    assert Run(tmp_path).manifest() == {"n": {}} and (tmp_path / "manifest.json.part").read_text() == "mine"


@pytest.fixture
def read_only():
    """A run's folder that this process may read and not write, root or not."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place) / "run"
        folder.mkdir()
        Run(folder).write_record("data", {"recipe": "answers"})
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield folder
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_run_folder_that_cannot_be_written_is_one_sentence(read_only):
    for write, *given in (
        (Run(read_only).write_record, "training", {}),
        (atomic_folder(read_only / "adapter").__enter__,),
        (lock, read_only),
        (Run.named, str(read_only / "new")),
    ):
        refused = refusal(write, *given)
        assert "cannot be written" in refused and str(read_only) in refused
    assert [path.name for path in read_only.iterdir()] == ["manifest.json"]
    assert Run(read_only).manifest() == {"data": {"recipe": "answers"}}


@pytest.mark.integration
def test_an_interrupt_in_mid_training_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    steps, settings = [], prepare_run(tmp_path, rows=16, num_train_epochs=5)

    def step(trainer, *args, take=training.AnswerTrainer.training_step, **kwargs):
        if trainer.is_in_train:  # not in the step that is measured before
            steps.append(trainer.state.global_step)
            if steps == list(range(8)):
                raise KeyboardInterrupt
        return take(trainer, *args, **kwargs)

    monkeypatch.setattr(training.AnswerTrainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        training.finetune(tmp_path, **settings)
    training.finetune(tmp_path, **settings)
    assert steps == [*range(8), *range(7, 10)]  # a checkpoint a tenth of the way: after each step
