import json

import pytest

from alpaca_helpers import AlpacaError
from alpaca_helpers.files import atomic_folder, write_json
from alpaca_helpers.runs import artifact, read_manifest, run_folder, write_record


def test_a_missing_artifact_names_the_notebook_that_makes_it(tmp_path):
    with pytest.raises(AlpacaError, match="no data: run notebook 02_dataset_and_tokenizer first"):
        artifact(tmp_path, "data")


def test_whole_folder_is_all_or_nothing(tmp_path):
    target = tmp_path / "adapter"
    with atomic_folder(target) as part:
        (part / "one").write_text("old")
    with pytest.raises(OSError), atomic_folder(target) as part:
        (part / "one").write_text("new")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (target / "one").read_text() == "old"
    with atomic_folder(target) as part:
        (part / "two").write_text("new")
    assert {path.name for path in target.iterdir()} == {"two", "checksums.json"}


def test_manifest_keeps_its_parts(tmp_path):
    write_record(tmp_path, "data", {"recipe": "answers"})
    write_record(tmp_path, "training", {"seed": 1})
    assert read_manifest(tmp_path) == {"data": {"recipe": "answers"}, "training": {"seed": 1}}


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        write_json(path, {"n": object()})
    assert json.loads(path.read_text()) == {"n": 1}


def test_a_run_is_a_name_or_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("mine") == tmp_path / "runs" / "mine"
    assert run_folder(f"{tmp_path}/elsewhere") == tmp_path / "elsewhere"
    assert run_folder("./here") == tmp_path / "here" and run_folder("a/b") == tmp_path / "a" / "b"
