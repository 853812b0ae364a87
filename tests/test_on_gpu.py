"""What is to be measured on a GPU runs here at its smallest, and computes what the series computes."""

import json
import subprocess
import sys

import pytest
import torch

from alpaca_helpers.batches import PadToLongest
from alpaca_helpers.data import IGNORED
from alpaca_helpers.models import base_dtype
from benchmarks import graphs
from benchmarks.on_gpu import PARTS, PROJECT

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, IGNORED, 7, 8, 9]},
    {"input_ids": [4, 3], "labels": [IGNORED, 3]},
]


def on_gpu(*options):
    command = [sys.executable, "-m", "benchmarks.on_gpu", *options]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


def test_few_shapes_hold_the_same_tokens_and_labels():
    batch = graphs.static_batch(graphs.padded_rows, PadToLongest(1), ROWS)
    assert batch["input_ids"].shape == (2, 16) and len(batch["before"]) == len(batch["targets"]) == 256
    assert batch["input_ids"][:, :5].tolist() == [[5, 6, 7, 8, 9], [4, 3, 1, 1, 1]]
    real = batch["targets"] != IGNORED
    pairs = list(zip(batch["input_ids"].flatten()[batch["before"]][real].tolist(), batch["targets"][real].tolist()))
    assert pairs == [(6, 7), (7, 8), (8, 9), (4, 3)]


def test_packed_rows_keep_their_own_positions_and_labels():
    batch = graphs.static_batch(graphs.packed_rows, PadToLongest(1), ROWS)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, 1024)
    assert batch["position_ids"][0, :9].tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 0]
    real = batch["targets"] != IGNORED
    pairs = list(zip(batch["input_ids"].flatten()[batch["before"]][real].tolist(), batch["targets"][real].tolist()))
    assert pairs == [(6, 7), (7, 8), (8, 9), (4, 3)]


def test_without_time_nothing_is_begun(tmp_path):
    done = on_gpu("--out", tmp_path, "--limit", "0")
    assert done.returncode == 0 and [line.split(": left out")[0] for line in done.stdout.splitlines()] == list(PARTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_every_part_runs_at_its_smallest(tmp_path):
    done = on_gpu("--out", tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout + "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    made = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert made.keys() == {"gradients", "race-16", "generation", "patches"}
    rounding = 1e-2 if base_dtype() == torch.bfloat16 else 1e-5
    for name, found in made["gradients"].items():
        assert found["loss"] < rounding and found["gradients"] < 10 * rounding, name
        assert found["different losses of four under dropout"] == 4, name
    race = made["race-16"]["training"]["pocket"]
    for name in ("graphed", "packed"):
        assert race[name]["heldout_loss"] == pytest.approx(race["ours"]["heldout_loss"], abs=0.05), name
    assert [result["differ"] for result in made["generation"]] == [0, 0]
