"""What to run: the notebooks' parameters, each with its type and range, and the profiles for those left open.

A command line hands over text ("3e-4", "false", "c_attn"); what spells a value of the right type becomes that value.
"""

import argparse
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from . import AlpacaError, locate
from .data import RECIPES


@dataclass(frozen=True)
class Profile:
    """A model, a dataset and the settings that go with them."""

    name: str
    model: str  # a folder, or a name on the Hub
    dataset: str  # a file, or a name on the Hub
    heldout_rows: int  # rows to hold out where they are split off the dataset
    learning_rate: float
    num_train_epochs: float
    heldout: str | None = None  # file with the held-out rows; None: they are split off the dataset
    model_revision: str | None = None  # commit on the Hub
    dataset_revision: str | None = None


PROFILES = {
    "pocket": Profile(
        name="pocket",
        model="alpaca_helpers/pocket/model",
        dataset="alpaca_helpers/pocket/instructions/train.jsonl",
        heldout="alpaca_helpers/pocket/instructions/heldout.jsonl",
        heldout_rows=200,
        learning_rate=3e-3,
        num_train_epochs=10,
    ),
    "gpt2-medium": Profile(
        name="gpt2-medium",
        model="openai-community/gpt2-medium",
        model_revision="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        dataset="tatsu-lab/alpaca",
        dataset_revision="dce01c9b08f87459cf36a430d809084718273017",
        heldout_rows=500,
        learning_rate=3e-4,
        num_train_epochs=2,
    ),
}


def _run(run: str) -> str:
    path = re.sub(r"^[A-Za-z]:(?=[\\/])", "", run)  # without a drive of Windows
    # file names on every system; papermill fills in what is in braces
    if re.search(r"[<>:\"|?*{}\x00-\x1f]", path) or any(
        len(os.fsencode(part)) > 200 for part in re.split(r"[\\/]", path)
    ):
        raise ValueError('a run is a name or a path, not too long, without < > : " | ? * { }')
    return run


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]  # of a model or a dataset: a path, or owner/name
Run = Annotated[str, Field(coerce_numbers_to_str=True, max_length=1000), AfterValidator(_run)]
Layers = Annotated[list[Name], Field(min_length=1), BeforeValidator(lambda of: [of] if isinstance(of, str) else of)]


class Parameters(BaseModel):
    """Every parameter of the notebooks; None where a notebook takes the profile's or the model's own value."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    profile: Literal[("auto", *PROFILES)] = "auto"  # type: ignore[valid-type]
    run: Annotated[Run, BeforeValidator(lambda run: "" if run is None else run)] = ""
    model_name: Name | None = None
    dataset_name: Name | None = None
    recipe: Literal[tuple(RECIPES)] = "answers"  # type: ignore[valid-type]
    max_words: Count = 80
    max_length: Annotated[int, Field(ge=16, le=2**20)] = 128  # tokens; a prompt alone takes about ten
    max_train_rows: Count | None = None
    heldout_rows: Count | None = None
    lora_rank: Annotated[int, Field(ge=1, le=4096)] = 8
    lora_alpha: Annotated[int, Field(ge=1, le=65536)] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    target_modules: Layers | None = None  # of layers, or all-linear
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    num_train_epochs: Annotated[float, Field(gt=0, le=10_000)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    max_new_tokens: Count = 80
    max_heldout_rows: Count = 300
    other_run: Annotated[str, Field(max_length=1000)] = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    merged: bool = False
    gguf: bool = False
    report_to: Annotated[str, Field(pattern=r"^\w+$")] = "none"
    push_to: Annotated[str, Field(pattern=r"^([\w.-]+/[\w.-]+)?$")] = ""
    resume: bool = True
    run_earlier: bool = True
    repo_url: str = ""

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, field: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[str(field.field_name)].annotation is not bool:
            raise ValueError("true and false are for yes and no")
        return value


def check_parameters(given: Mapping[str, object]) -> dict[str, Any]:
    """Return the parameters by name, each as its own type; AlpacaError for one that is unknown, or has a bad value."""
    try:
        checked = Parameters(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        reason = re.sub("^(Input|String) should", "it should", first["msg"].removeprefix("Value error, "))
        reason = reason.replace(
            "Extra inputs are not permitted", f"there are only {', '.join(Parameters.model_fields)}"
        )
        raise AlpacaError(f"The parameter `{name}` is {given[name]!r:.60}: {reason}.") from error
    return {name: getattr(checked, name) for name in given}


def add_parameters(parser: argparse.ArgumentParser) -> None:
    """Let a command line give parameters as papermill's does, `-p KEY VALUE`, for `parse_parameters`."""
    what = "a notebook's parameter, as papermill takes it"
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help=what)


def parse_parameters(pairs: Iterable[Sequence[str]], **given: object) -> dict[str, Any]:
    """Return the checked parameters of a command line: `given`, and those of `-p`; AlpacaError for one given twice."""
    values = dict(given)
    for key, text in pairs:
        value: object = None if text in ("None", "null") else text
        if text.startswith("["):
            with suppress(ValueError, RecursionError):  # else it is checked as text
                value = json.loads(text)
        if values.setdefault(key, value) != value:
            raise AlpacaError(f"The parameter `{key}` is given twice, as {values[key]} and as {text}: give it once.")
    return check_parameters(values)


def choose_profile(name: str = "auto", model: str | None = None, dataset: str | None = None) -> Profile:
    """Return the profile of that name, with another model or dataset where one is given.

    `auto` is gpt2-medium where torch sees a GPU, else pocket. Another `model` or `dataset` than the profile's drops its
    pinned revision, and another dataset its held-out file too.
    """
    if name == "auto":
        name = "gpt2-medium" if torch.cuda.is_available() else "pocket"
    profile = PROFILES[name]
    if model is not None and _absolute(model) != _absolute(profile.model):
        profile = replace(profile, model=_absolute(model), model_revision=None)
    if dataset is not None and _absolute(dataset) != _absolute(profile.dataset):
        profile = replace(profile, dataset=_absolute(dataset), dataset_revision=None, heldout=None)
    return profile


def _absolute(name: str) -> str:
    """Return the absolute path of a folder or file that is here; any other name, such as one on the Hub, as it is."""
    place = locate(name, typed=True)
    return str(place.resolve()) if os.path.exists(place) else name
