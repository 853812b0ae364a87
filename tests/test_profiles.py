import inspect
import os

import pytest
import torch
from support import PROJECT

from alpaca_helpers import AlpacaError
from alpaca_helpers.data import drop_reason, tokenize
from alpaca_helpers.lora import KNOWN_TARGETS
from alpaca_helpers.profiles import PROFILES, choose_profile
from alpaca_helpers.training import make_trainer


def test_auto_follows_the_gpu(monkeypatch):
    for there, name in ((True, "gpt2-medium"), (False, "pocket")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_profile("auto").name == name


def test_the_documents_settings_on_gpt2_medium():
    p, trained = PROFILES["gpt2-medium"], inspect.signature(make_trainer).parameters
    assert (p.learning_rate, p.num_train_epochs) == (3e-4, 2)
    defaults = {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": None, "batch_size": 16}
    assert {name: trained[name].default for name in defaults} == defaults
    assert KNOWN_TARGETS["gpt2"] == ["c_attn"]  # what None stands for there
    assert inspect.signature(drop_reason).parameters["max_words"].default == 80
    assert inspect.signature(tokenize).parameters["max_length"].default == 128
    assert len(p.model_revision) == len(p.dataset_revision) == 40


def test_changes_and_what_they_unpin(tmp_path):
    changed = choose_profile("gpt2-medium", model="openai-community/gpt2-large", heldout_rows=3)
    assert (changed.model_revision, changed.heldout_rows, changed.learning_rate) == (None, 3, 3e-4)
    assert changed.dataset_revision == PROFILES["gpt2-medium"].dataset_revision
    changed = choose_profile("pocket", dataset=str(PROJECT / "mine.json"))
    assert (changed.dataset, changed.heldout) == ("mine.json", None)  # no path of this machine in a manifest


def test_a_path_is_recorded_as_seen_from_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT / "notebooks")
    assert choose_profile("pocket", model="../alpaca_helpers").model == "alpaca_helpers"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text("[]")
    assert PROJECT / choose_profile("pocket", dataset="mine.json").dataset == PROJECT / os.path.relpath(
        tmp_path / "mine.json", PROJECT
    )
    assert choose_profile("gpt2-medium", model="openai-community/gpt2").model == "openai-community/gpt2"


def test_unknown_names():
    with pytest.raises(AlpacaError, match="no profile 'big': choose auto, pocket or gpt2-medium"):
        choose_profile("big")
