"""The adapter's model card, and the adapter on the Hub."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import create_repo, upload_folder

from . import AlpacaError, locate
from .config import PROFILES
from .data import RECIPES
from .files import write_json, write_text
from .hub import first_line
from .lora import save_merged
from .models import load_base, load_tokenizer
from .prompts import format_prompt
from .run import Run

SHOWN = (  # the settings that a card lists
    "lora_rank lora_alpha lora_dropout target_modules learning_rate num_train_epochs batch_size max_words max_length "
    "max_train_rows seed"
).split()
LICENCES = {  # of the data, by dataset: the card's tag, and the sentence
    "tatsu-lab/alpaca": (
        "cc-by-nc-4.0",
        "Alpaca is CC BY-NC 4.0: non-commercial use, with attribution, the adapter's too.",
    ),
    PROFILES["pocket"].dataset: (None, "The rows were written for this project: its licence holds."),
}
UNKNOWN_LICENCE = (None, "Not known here: the licence of the dataset holds for the adapter too.")


def push_adapter(adapter: Path, repository: str) -> str:
    """Upload the adapter's folder to the Hub and return its address; a new repository is private.

    Raises AlpacaError where the Hub refuses, or is out of reach.
    """
    try:
        name = create_repo(repository, private=True, exist_ok=True).repo_id
        return str(upload_folder(repo_id=name, folder_path=adapter, commit_message="LoRA adapter and model card"))
    except Exception as error:  # the library's exceptions differ from release to release
        what = f"The adapter was not pushed to {repository} ({first_line(error)}): it is whole on disk"
        remedy = "log in with `hf auth login` and check the name (owner/name) and the network"
        raise AlpacaError(f"{what}; {remedy}.", "push-refused") from error


def export(folder: Path, settings: SimpleNamespace) -> None:
    """Do what the parameters `merged` and `push_to` ask for: write the run's whole model, upload its adapter."""
    if settings.merged:
        base, tokenizer = (load(settings.model, settings.model_revision) for load in (load_base, load_tokenizer))
        with Run(folder).lock():
            save_merged(base, tokenizer, folder / "adapter", folder / "merged")
    if settings.push_to:
        print(push_adapter(folder / "adapter", settings.push_to))


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
    write_text(folder / "adapter" / "README.md", model_card(made, measured))


def model_card(training: dict, metrics: dict) -> str:
    """Return the model card in Markdown, made of the manifest's record of the adapter and of its metrics, if any."""
    loading, places = _loading(training["model"], training["model_revision"]), ("model", "dataset")
    training = training | {key: Path(training[key]).name for key in places if Path(training[key]).is_absolute()}
    tag, licence = LICENCES.get(training["dataset"], UNKNOWN_LICENCE)
    features = RECIPES[training["recipe"]]
    end = ", and ends with the end-of-text token." if "eos" in features else "."
    head = ["library_name: peft", "pipeline_tag: text-generation"] + [f"license: {tag}"] * bool(tag)
    if training["model_revision"]:  # only a model on the Hub has one
        head.append(f"base_model: {training['model']}")
    facts = {
        "base": f"{training['model']}, revision {training['model_revision'] or 'none'}, held in {training['dtype']}",
        "data": f"{training['dataset']}, SHA-256 of the rows {training['fingerprint']}",
        "recipe": f"{training['recipe']} ({', '.join(sorted(features)) or 'as the document has it'})",
        **{name: training[name] for name in SHOWN},
        **training.get("result", {}),
        "versions": ", ".join(f"{name} {number}" for name, number in training["versions"].items()),
        "hardware": training["hardware"],
        "commit": training["commit"],
    }
    return "\n".join(
        ["---", *head, "---", "", f"# {training['model']} with LoRA, answering instructions", "", "## Prompt", ""]
        + ["```", format_prompt("{instruction}", "{input, or no such line}" if "input" in features else ""), "```", ""]
        + [f"The answer follows after a space{end}", ""]
        + ["## Load it", "", "```python", *loading, "```", ""]
        + ["## What made it", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
        + ["## What it reached on held-out rows", "", *_table(metrics), ""]
        + ["## Licence of the data", "", licence, ""]
    )


def _loading(model: str, revision: str | None) -> list[str]:
    """Return the lines of Python that load the adapter on its base, from any working folder."""
    here = not revision and locate(model).exists()  # AutoPeftModelForCausalLM would look from the working folder
    arguments = f'locate("{model}")' if here else f'"{model}"' + (f', revision="{revision}"' if revision else "")
    return [
        *["from alpaca_helpers import locate"] * here,
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'adapter = "this folder"',
        f'base = AutoModelForCausalLM.from_pretrained({arguments}, dtype="float32")',
        "model = PeftModel.from_pretrained(base, adapter).eval()",
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
    ]


def _table(metrics: dict) -> list[str]:
    """Return the lines of a table of the metrics, base against tuned."""
    if not metrics:
        return ["Not measured yet: notebook 04 does it."]
    base, tuned = metrics["base"], metrics["tuned"]
    numbers = [name for name, value in base.items() if isinstance(value, int | float) and name in tuned]
    rows = [f"| {name} | {base[name]:.3g} | {tuned[name]:.3g} |" for name in numbers]
    return [f"| {metrics['n']} rows | base | tuned |", "|---|---:|---:|", *rows]
