"""Profiles: what to run. Each is one flat record of a model, a dataset and the document's settings."""

from dataclasses import dataclass, fields, replace

from . import AlpacaError, locate, portable


@dataclass(frozen=True)
class Profile:
    """One way to run the series; most fields are notebook parameters of the same name."""

    name: str
    model: str  # a folder, or a name on the Hub
    model_revision: str | None  # commit on the Hub
    dataset: str  # a file, or a name on the Hub
    dataset_revision: str | None
    heldout: str | None  # file with the held-out rows; None: they are split off the dataset
    heldout_rows: int  # rows to hold out when they are split off
    max_train_rows: int | None = None  # None: all
    max_words: int = 80  # longest answer kept
    max_length: int = 128  # tokens a row
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] = ("c_attn",)
    learning_rate: float = 3e-4
    num_train_epochs: float = 2
    batch_size: int = 16  # rows an optimizer step, all devices together
    micro_batch_size: int = 16  # rows in memory at once, a device
    seed: int = 0


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
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
        Profile(
            name="gpt2-medium",
            model="openai-community/gpt2-medium",
            model_revision="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
            dataset="tatsu-lab/alpaca",
            dataset_revision="dce01c9b08f87459cf36a430d809084718273017",
            heldout=None,
            heldout_rows=500,
        ),
    )
}


def choose_profile(name: str = "auto", **changes) -> Profile:
    """Return the profile of that name with `changes` applied; a change that is None keeps the profile's value.

    `auto` is gpt2-medium where torch sees a GPU, else pocket. Another `model` or `dataset` than the profile's
    drops the profile's pinned revision, and another dataset its held-out file too.

    Raises AlpacaError for a name or a setting that no profile has.
    """
    if name == "auto":
        import torch

        name = "gpt2-medium" if torch.cuda.is_available() else "pocket"
    if name not in PROFILES:
        raise AlpacaError(f"There is no profile {name!r}: choose auto, {' or '.join(PROFILES)}.")
    profile = PROFILES[name]
    changes = {key: value for key, value in changes.items() if value is not None}
    unknown = set(changes) - {field.name for field in fields(Profile)}
    if unknown:
        raise AlpacaError(f"A profile has no setting {sorted(unknown)[0]!r}: see alpaca_helpers/profiles.py.")
    for key in {"model", "dataset"} & set(changes):
        place = locate(changes[key])  # recorded as seen from the project, whatever the working folder
        changes[key] = portable(str(place.resolve()) if place.exists() else changes[key])
    unpinned: dict[str, None] = {}
    if changes.get("model", profile.model) != profile.model:
        unpinned["model_revision"] = None
    if changes.get("dataset", profile.dataset) != profile.dataset:
        unpinned |= {"dataset_revision": None, "heldout": None}
    return replace(profile, **unpinned | changes)
