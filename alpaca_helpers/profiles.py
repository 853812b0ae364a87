"""Profiles: what to run. Each is one flat record of a model, a dataset and the settings that go with them."""

import os
from dataclasses import dataclass, replace

from . import AlpacaError, locate


@dataclass(frozen=True)
class Profile:
    """One way to run the series. All other settings are the notebooks' own parameters, the same for every profile."""

    name: str
    model: str  # a folder, or a name on the Hub
    model_revision: str | None  # commit on the Hub
    dataset: str  # a file, or a name on the Hub
    dataset_revision: str | None
    heldout: str | None  # file with the held-out rows; None: they are split off the dataset
    heldout_rows: int  # rows to hold out when they are split off
    learning_rate: float
    num_train_epochs: float


PROFILES = {
    "pocket": Profile(
        name="pocket",
        model="alpaca_helpers/pocket/model",
        model_revision=None,
        dataset="alpaca_helpers/pocket/instructions/train.jsonl",
        dataset_revision=None,
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
        heldout=None,
        heldout_rows=500,
        learning_rate=3e-4,
        num_train_epochs=2,
    ),
}


def choose_profile(
    name: str = "auto", model: str | None = None, dataset: str | None = None, heldout_rows: int | None = None
) -> Profile:
    """Return the profile of that name, with another model, dataset or number of held-out rows where one is given.

    `auto` is gpt2-medium where torch sees a GPU, else pocket; a name that no profile has raises AlpacaError. Another
    `model` or `dataset` than the profile's drops its pinned revision, and another dataset its held-out file too.
    """
    if name == "auto":
        import torch

        name = "gpt2-medium" if torch.cuda.is_available() else "pocket"
    if name not in PROFILES:
        raise AlpacaError(f"There is no profile {name!r}: choose auto, {' or '.join(PROFILES)}.", "unknown-profile")
    profile = PROFILES[name]
    if model is not None and _absolute(model) != _absolute(profile.model):
        profile = replace(profile, model=_absolute(model), model_revision=None)
    if dataset is not None and _absolute(dataset) != _absolute(profile.dataset):
        profile = replace(profile, dataset=_absolute(dataset), dataset_revision=None, heldout=None)
    return profile if heldout_rows is None else replace(profile, heldout_rows=heldout_rows)


def _absolute(name: str) -> str:
    """Return the absolute path of a folder or file that is here; any other name, such as one on the Hub, as it is."""
    place = locate(name, typed=True)
    return str(place.resolve()) if os.path.exists(place) else name
