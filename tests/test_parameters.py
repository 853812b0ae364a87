"""A parameter of another type or out of range, a default that is not the document's, a profile with a wrong pin."""

import ast
import inspect
import math
from unittest.mock import Mock

import nbformat
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from support import PROJECT, refusal

import alpaca_helpers
from alpaca_helpers import locate, portable
from alpaca_helpers.cells import FURTHER, NOTEBOOKS
from alpaca_helpers.config import PROFILES, Parameters, check_parameters, choose_profile
from alpaca_helpers.data import tokenize
from alpaca_helpers.lora import KNOWN_TARGETS
from alpaca_helpers.series import open_run
from alpaca_lessons.dataset import drop_reason


def test_every_parameter_of_the_notebooks_is_checked_there_and_its_default_is_right():
    known = set()
    for notebook in [*NOTEBOOKS, *FURTHER]:
        cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
        first, *others = (ast.parse(TransformerManager().transform_cell(cell.source)) for cell in cells)
        defaults = {node.target.id: ast.literal_eval(node.value) for node in first.body}
        for name, default in defaults.items():
            assert check_parameters({name: default}) == {name: default}
        calls = [ast.unparse(node) for tree in others for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert f"open_run('{notebook.stem}', globals())" in calls
        known |= defaults.keys()
    assert known == set(Parameters.model_fields)


def test_open_run_checks_what_the_notebook_sets_and_fills_in_what_it_leaves_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"profile": "pocket", "run": "r", "model_name": None, "max_new_tokens": "60", "seed": 0, "repo_url": ""}
    settings, folder = open_run("01_base_model", values | {"lora_rank": "of another notebook"})
    assert (settings.max_new_tokens, settings.model, folder) == (60, PROFILES["pocket"].model, tmp_path / "runs" / "r")
    assert (settings.model_path / "config.json").is_file() and not hasattr(settings, "lora_rank")
    for name, value, phrase in (("seed", "x", "The parameter `"), ("max_new_tokens", 250, "a context of")):
        assert phrase in refusal(open_run, "01_base_model", values | {name: value})
    later = values | dict.fromkeys(("lora_rank", "seed"), 1) | {"run_earlier": False}
    assert "run notebook 02_dataset_and_tokenizer" in refusal(open_run, "03_lora_finetuning", later)


def test_profiles_are_within_the_ranges():
    assert {"auto", *PROFILES} == set(Parameters.model_fields["profile"].annotation.__args__)
    for profile in PROFILES.values():
        check_parameters(
            {name: getattr(profile, name) for name in ("learning_rate", "num_train_epochs", "heldout_rows")}
        )


def test_what_spells_a_value_is_that_value():
    for name, pairs in {
        "target_modules": [("c_attn", ["c_attn"]), (["a", "b"], ["a", "b"]), ("all-linear", ["all-linear"])],
        "learning_rate": [("3e-4", 3e-4), (None, None)],  # YAML reads 3e-4 as text
        "lora_dropout": [(".05", 0.05)],
        "lora_rank": [("4", 4)],
        "merged": [("false", False), ("True", True), ("no", False)],
        "run": [(2024, "2024"), (0, "0"), (None, ""), ("C:\\runs\\mine", "C:\\runs\\mine"), ("a b/é", "a b/é")],
    }.items():
        for given, value in pairs:
            assert check_parameters({name: given}) == {name: value}


@pytest.mark.parametrize(
    "name, values",
    {
        "max_train_rows": [0, -5, 1.5, "many", True],
        "heldout_rows": [0, -1],
        "max_heldout_rows": [0, None],
        "max_words": [0, None],
        "max_length": [-1, 0, 3],
        "max_new_tokens": [0, "abc"],
        "batch_size": [0, 1_000_000],
        "micro_batch_size": [0],
        "num_train_epochs": [0, math.nan, math.inf],
        "learning_rate": [0, -1, math.nan, "fast"],
        "lora_rank": [0, True, 8.5],
        "lora_alpha": [0],
        "lora_dropout": [1.0, -0.1, math.nan],
        "target_modules": [[], "", [""], ["a", 1], 3],
        "seed": [-1, 2**40, "text"],
        "model_name": [True, "", "a" * 5000, ["a"]],
        "dataset_name": [123, ""],
        "profile": ["", "big", ["pocket"], None],
        "run": [["a"], True, "a::b", "a{b}", "a\0b", "x" * 300, "é" * 150, "a/" * 1500],
        "recipe": ["", "best", None],
        "merged": ["maybe", 2],
        "push_to": ["alone", "a/b/c"],
    }.items(),
)
def test_what_is_none_is_refused_by_name_and_value(name, values):
    for value in values:
        said = refusal(check_parameters, {name: value})
        assert said.startswith(f"The parameter `{name}` is {value!r:.20}") and len(said) < 300


def test_several_come_back_in_their_order_and_an_unknown_one_is_refused():
    assert list(check_parameters({"seed": "1", "lora_rank": 4}).items()) == [("seed", 1), ("lora_rank", 4)]
    assert "`wrod` is 'x': there are only profile, run, " in refusal(check_parameters, {"wrod": "x"})


def test_the_documents_settings_on_gpt2_medium():
    p, defaults = PROFILES["gpt2-medium"], {name: field.default for name, field in Parameters.model_fields.items()}
    assert (p.learning_rate, p.num_train_epochs) == (3e-4, 2)
    wanted = {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": None, "batch_size": 16}
    assert wanted.items() <= defaults.items()
    assert KNOWN_TARGETS["gpt2"] == ["c_attn"]  # what None stands for there
    assert inspect.signature(drop_reason).parameters["max_words"].default == 80
    assert inspect.signature(tokenize).parameters["max_length"].default == 128


def test_auto_follows_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", Mock(side_effect=[True, False]))
    assert [choose_profile("auto").name for _ in range(2)] == ["gpt2-medium", "pocket"]


def test_changes_and_what_they_unpin():
    changed = choose_profile("gpt2-medium", model="openai-community/gpt2-large")
    assert (changed.model, changed.model_revision) == ("openai-community/gpt2-large", None)
    assert (changed.heldout_rows, changed.learning_rate) == (500, 3e-4)
    assert changed.dataset_revision == PROFILES["gpt2-medium"].dataset_revision
    changed = choose_profile("pocket", dataset=str(PROJECT / "mine.json"))
    assert (changed.dataset, changed.heldout) == (str(PROJECT / "mine.json"), None)
    assert choose_profile("pocket", dataset=str(PROJECT / PROFILES["pocket"].dataset)) == PROFILES["pocket"]


def test_the_file_that_was_typed_is_the_one_that_is_read(tmp_path, monkeypatch):
    """A checkout, a kernel in its `notebooks`, and a file of the same name in three places."""
    package, notebooks = tmp_path / "repo" / "alpaca_helpers", tmp_path / "repo" / "notebooks"
    outside, inside, beside = (folder / "rows.json" for folder in (tmp_path, tmp_path / "repo", notebooks))
    notebooks.mkdir(parents=True)
    for path in (notebooks / "01_base_model.ipynb", outside, inside, beside):
        path.write_text("[]")
    monkeypatch.setattr(alpaca_helpers, "PACKAGE", package)
    monkeypatch.chdir(notebooks)
    for typed, meant, recorded in (
        (str(outside), outside, str(outside)),
        ("../../rows.json", outside, str(outside)),
        ("../rows.json", inside, "rows.json"),
        ("rows.json", beside, "notebooks/rows.json"),
    ):
        used = choose_profile("pocket", dataset=typed).dataset
        assert used == str(meant) and portable(used) == recorded and locate(recorded) == meant
    assert locate("../rows.json").resolve() == outside  # as 0.2.0 recorded it
    beside.unlink()
    assert choose_profile("pocket", dataset="rows.json").dataset == str(inside)
    for name in ("owner/name", "~nobody-here/x", "a\0b", "no.json"):
        assert choose_profile("pocket", dataset=name).dataset == portable(name) == name
    (notebooks / "loop").symlink_to("loop")
    assert choose_profile("pocket", model="loop").model == "loop"
    assert "is too long for a file's name" in refusal(choose_profile, "pocket", model="x" * 300)
