"""The notebooks' parameters: the type and range of each, checked in one place whatever the way they came in.

A command line hands over text ("3e-4", "false", "c_attn"); what spells a value of the right type becomes that value.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from . import AlpacaError
from .data import RECIPES

PLAIN = re.compile(r"[^<>:\"|?*{}\x00-\x1f]+")  # of a file name on every system; papermill fills in what is in braces


def _name_of_a_run(run: str) -> str:
    anchored = re.sub(r"^[A-Za-z]:(?=[\\/])", "", run)  # a drive of Windows
    if run and (not PLAIN.fullmatch(anchored) or any(len(part) > 200 for part in re.split(r"[\\/]", run))):
        raise ValueError('a run is a name or a path without < > : " | ? * { }')
    return run


def _modules(modules: object) -> list[str] | str | None:
    if modules is None:
        return None
    if modules in ("all-linear", ["all-linear"]):
        return "all-linear"
    names = [modules] if isinstance(modules, str) else modules
    if not (isinstance(names, list) and names and all(name and isinstance(name, str) for name in names)):
        raise ValueError("a list of layers' names, or all-linear")
    return names


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("true and false are for yes and no")
    return value


def _number_as_text(value: object) -> object:
    return "" if value is None else str(_no_truth(value)) if isinstance(value, int | float) else value


def _recipe(recipe: str) -> str:
    if recipe not in RECIPES:
        raise ValueError(f"choose {', '.join(RECIPES)}")
    return recipe


Whole = Annotated[int, BeforeValidator(_no_truth)]
Number = Annotated[float, BeforeValidator(_no_truth)]
Count = Annotated[Whole, Field(ge=1, le=2**31 - 1)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]  # of a model or a dataset: a path, or owner/name


class Parameters(BaseModel):
    """Every parameter of the four notebooks; None where a notebook takes the profile's or the model's own value."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    profile: Literal["auto", "pocket", "gpt2-medium"] = "auto"
    run: Annotated[str, AfterValidator(_name_of_a_run), BeforeValidator(_number_as_text)] = ""
    model_name: Name | None = None
    dataset_name: Name | None = None
    recipe: Annotated[str, AfterValidator(_recipe)] = "answers"
    max_words: Count = 80
    max_length: Annotated[Whole, Field(ge=16, le=2**20)] = 128  # tokens; a prompt alone takes about ten
    max_train_rows: Count | None = None
    heldout_rows: Count | None = None
    lora_rank: Annotated[Whole, Field(ge=1, le=4096)] = 8
    lora_alpha: Annotated[Whole, Field(ge=1, le=65536)] = 16
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    target_modules: Annotated[list[str] | str | None, BeforeValidator(_modules)] = None
    learning_rate: Annotated[Number, Field(gt=0, le=1)] | None = None
    num_train_epochs: Annotated[Number, Field(gt=0, le=10_000)] | None = None
    batch_size: Annotated[Whole, Field(ge=1, le=65536)] = 16
    micro_batch_size: Annotated[Whole, Field(ge=1, le=65536)] = 16
    max_new_tokens: Count = 80
    max_heldout_rows: Count = 300
    other_run: Annotated[str, Field(max_length=1000)] = ""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    merged: bool = False
    gguf: bool = False
    report_to: Annotated[str, Field(pattern=r"^\w+$")] = "none"
    push_to: Annotated[str, Field(pattern=r"^([\w.-]+/[\w.-]+)?$")] = ""
    resume: bool = True
    run_earlier: bool = True
    repo_url: str = ""


def check_parameters(**given):
    """Return the values of the parameters given by name, in that order, each of its own type; of one, it alone.

    Raises AlpacaError that names the parameter, its value and what it may be, also for a name that no notebook has.
    """
    try:
        checked = Parameters(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, value = str(first["loc"][0]), f"{first['input']!r:.60}"
        if name not in Parameters.model_fields:
            known = ", ".join(sorted(Parameters.model_fields))
            what = f"No notebook has a parameter {name!r}: choose among {known}."
            raise AlpacaError(what, "unknown-parameter") from error
        reason = re.sub("^(Input|String) should", "it should", first["msg"].removeprefix("Value error, "))
        raise AlpacaError(f"The parameter `{name}` is {value}: {reason}.", "bad-parameter") from error
    values = [getattr(checked, name) for name in given]
    return values[0] if len(values) == 1 else values
