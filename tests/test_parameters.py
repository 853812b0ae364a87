"""The notebooks' parameters: `python -m pytest tests/test_parameters.py`."""

import ast
import inspect
import math

import nbformat
import pytest

from alpaca_helpers import AlpacaError
from alpaca_helpers.parameters import Parameters, check_parameters
from alpaca_helpers.profiles import PROFILES
from alpaca_helpers.series import NOTEBOOKS
from alpaca_helpers.training import make_trainer


def typed_in(notebook):
    """The names in the notebook's cell of parameters, with their defaults."""
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cells[0].source).body}


def test_every_parameter_of_the_notebooks_has_a_type_and_its_default_is_right():
    defaults = [typed_in(notebook) for notebook in NOTEBOOKS]
    assert {name for each in defaults for name in each} == set(Parameters.model_fields)
    for each in defaults:
        for name, default in each.items():
            assert check_parameters(**{name: default}) == default, name


def test_every_parameter_is_checked_by_its_notebook():
    for notebook in NOTEBOOKS:
        source = "\n".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells[:8])
        unchecked = [name for name in typed_in(notebook).keys() - {"repo_url"} if f"{name}={name}" not in source]
        assert not unchecked, (notebook.name, unchecked)


def test_profiles_and_torchruns_settings_are_within_the_ranges():
    assert {"auto", *PROFILES} == set(Parameters.model_fields["profile"].annotation.__args__)
    for name, parameter in inspect.signature(make_trainer).parameters.items():
        if name != "folder":
            default = parameter.default
            wanted = list(default) if isinstance(default, tuple) else default
            assert check_parameters(**{name: wanted}) == wanted


@pytest.mark.parametrize(
    "name, given, value",
    [
        ("target_modules", "c_attn", ["c_attn"]),
        ("target_modules", ["c_attn", "c_proj"], ["c_attn", "c_proj"]),
        ("target_modules", "all-linear", "all-linear"),
        ("target_modules", ["all-linear"], "all-linear"),
        ("target_modules", None, None),  # what peft knows for the model
        ("learning_rate", "3e-4", 3e-4),  # YAML reads 3e-4 as text
        ("learning_rate", None, None),
        ("lora_dropout", ".05", 0.05),
        ("lora_rank", "4", 4),
        ("merged", "false", False),
        ("merged", "True", True),
        ("resume", "no", False),
        ("run", 2024, "2024"),
        ("run", 0, "0"),
        ("run", None, ""),
        ("run", "C:\\runs\\mine", "C:\\runs\\mine"),
        ("run", "a b/été", "a b/été"),
    ],
)
def test_what_spells_a_value_is_that_value(name, given, value):
    assert check_parameters(**{name: given}) == value


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
        "model": [True, "", "a" * 5000, ["a"]],
        "dataset": [123, ""],
        "profile": ["", "big", ["pocket"], None],
        "run": [["a"], True, "a::b", "a{b}", "a\0b", "x" * 300],
        "recipe": ["", "best", None],
        "merged": ["maybe", 2],
        "push_to": ["alone", "a/b/c"],
    }.items(),
)
def test_what_is_none_is_refused_by_name_and_value(name, values):
    for value in values:
        with pytest.raises(AlpacaError) as refused:
            check_parameters(**{name: value})
        said = str(refused.value)
        assert refused.value.code == "bad-parameter" and "\n" not in said and len(said) < 300
        assert said.startswith(f"The parameter `{name}` is {value!r:.20}")


def test_several_come_back_in_their_order_and_an_unknown_one_is_refused():
    assert check_parameters(seed="1", lora_rank=4) == [1, 4]
    with pytest.raises(AlpacaError, match="has a parameter 'wrod': choose among batch_size, dataset, ") as refused:
        check_parameters(wrod="x")
    assert refused.value.code == "unknown-parameter"
