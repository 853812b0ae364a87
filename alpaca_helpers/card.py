"""The adapter's model card (its text: card.md), and the adapter on the Hub."""

import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder

from . import PACKAGE, AlpacaError, locate
from .config import PROFILES
from .data import RECIPES
from .files import replace_file, write_json
from .hub import first_line
from .lora import save_merged
from .models import load_base, load_tokenizer
from .prompts import format_prompt
from .run import Run

LICENCES = {
    "tatsu-lab/alpaca": "Alpaca is CC BY-NC 4.0: non-commercial use, with attribution, the adapter's too.",
    PROFILES["pocket"].dataset: "The rows were written for this project: its licence holds.",
}
TAGS = {"tatsu-lab/alpaca": "cc-by-nc-4.0"}  # of the licences, as the Hub names them


def export(folder: Path, settings: SimpleNamespace) -> None:
    """Do what the parameters `merged` and `push_to` ask for: write the run's whole model, upload its adapter.

    A new repository on the Hub is private. Raises AlpacaError where the Hub refuses, or is out of reach.
    """
    if settings.merged:
        base, tokenizer = (load(settings.model, settings.model_revision) for load in (load_base, load_tokenizer))
        with Run(folder).lock():
            save_merged(base, tokenizer, folder / "adapter", folder / "merged")
    if settings.push_to:
        try:
            name = create_repo(settings.push_to, private=True, exist_ok=True).repo_id
            print(upload_folder(repo_id=name, folder_path=folder / "adapter", commit_message="LoRA adapter"))
        except Exception as error:  # the library's exceptions differ from release to release
            what = f"The adapter was not pushed to {settings.push_to} ({first_line(error)}): it is whole on disk"
            remedy = "log in with `hf auth login` and check the name (owner/name) and the network"
            raise AlpacaError(f"{what}; {remedy}.", "push-refused") from error


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
    replace_file(folder / "adapter" / "README.md", model_card(made, measured).encode())


def model_card(made: dict, metrics: dict) -> str:
    """Return the model card in Markdown, from the manifest's record of the adapter and its metrics ({}: none yet)."""
    model, revision, features = made["model"], made["model_revision"], RECIPES[made["recipe"]]
    # an absolute path's folders are those of this machine: they are not published
    name, dataset = (Path(path).name if Path(path).is_absolute() else path for path in (model, made["dataset"]))
    local = not revision and locate(model).exists()  # from_pretrained would look for it from the working folder
    address = f"locate({json.dumps(model)})" if local else json.dumps(model)
    head: dict = {"library_name": "peft", "pipeline_tag": "text-generation", "license": TAGS.get(made["dataset"])}
    card = ModelCard.from_template(
        ModelCardData(**head, base_model=model if revision else None),  # only a model on the Hub has a revision
        template_path=str(PACKAGE / "card.md"),
        made=made,
        metrics=metrics,
        name=name,
        dataset=dataset,
        prompt=format_prompt("{instruction}", "{input, or no such line}" if "input" in features else ""),
        features=features,
        local=local,
        address=address + (f", revision={json.dumps(revision)}" if revision else ""),
        licence=LICENCES.get(made["dataset"], "Not known here: the licence of the dataset holds for the adapter too."),
    )
    return f"{card}\n"
