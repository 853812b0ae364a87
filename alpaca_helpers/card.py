"""The adapter's model card; its text is card.md."""

from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from . import PACKAGE, AlpacaError, portable
from .config import PROFILES
from .data import RECIPES
from .files import CARD, replace_file, write_json
from .prompts import format_prompt
from .run import Run

LICENCES = {
    "tatsu-lab/alpaca": "Alpaca is CC BY-NC 4.0: non-commercial use, with attribution, the adapter's too.",
    PROFILES["pocket"].dataset: "The rows were written for this project: its licence holds.",
}
TAGS = {"tatsu-lab/alpaca": "cc-by-nc-4.0"}  # of the licences, as the Hub names them


def published(path: str) -> str:
    """Return the name of a model or dataset for others to read: of a folder of this machine its name alone."""
    return Path(portable(path)).name if Path(portable(path)).is_absolute() else portable(path)


def save_metrics(folder: Path, metrics: dict) -> None:
    """Write the run's metrics.json, with what its adapter was made by, and the adapter's card, now with its metrics."""
    made = Run(folder).record("adapter")
    about = {"profile": made["name"], "recipe": made["recipe"], "seed": made["seed"], "adapter": made["sha256"]}
    with Run(folder).lock():
        write_json(folder / "metrics.json", metrics | about)
        write_card(folder)


def write_card(folder: Path) -> None:
    """Write the model card of the run's adapter, from the run's manifest and this adapter's metrics, if any."""
    made = Run(folder).record("adapter")
    metrics: dict = {}
    with suppress(AlpacaError):  # there are none yet, or of an earlier version, or cut: notebook 04 writes new ones
        metrics = Run(folder).metrics()
    measured = metrics if metrics.get("adapter") == made["sha256"] else {}
    replace_file(folder / "adapter" / CARD, model_card(made, measured).encode())


def model_card(made: dict, metrics: dict) -> str:
    """Return the model card in Markdown, from the manifest's record of the adapter and its metrics ({}: none yet)."""
    name, dataset, features = published(made["model"]), published(made["dataset"]), RECIPES[made["recipe"]]
    head: dict = {"library_name": "peft", "pipeline_tag": "text-generation", "license": TAGS.get(made["dataset"])}
    card = ModelCard.from_template(
        ModelCardData(**head, base_model=name if made["model_revision"] else None),  # only the Hub's have one
        template_path=str(PACKAGE / "card.md"),
        made=made,
        metrics=metrics,
        name=name,
        dataset=dataset,
        prompt=format_prompt("{instruction}", "{input, or no such line}" if "input" in features else ""),
        features=features,
        licence=LICENCES.get(made["dataset"], "Not known here: the licence of the dataset holds for the adapter too."),
    )
    return f"{card}\n"
