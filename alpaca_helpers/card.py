"""The adapter's model card, and the adapter on the Hub."""

import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import create_repo, upload_folder
from peft import PeftConfig

from . import AlpacaError, portable
from .data import RECIPES
from .files import CARD, write_checksums, write_json, write_text
from .hub import first_line
from .lora import name_base
from .profiles import PROFILES
from .prompts import format_prompt
from .runs import lock_run, read_metrics, read_record

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

LOADING = (
    "from peft import AutoPeftModelForCausalLM",
    "from transformers import AutoTokenizer",
    "",
    'adapter = "this folder"',
    'model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="float32").eval()',
    "tokenizer = AutoTokenizer.from_pretrained(adapter)",
)
FOLDER_BASE = (
    "The base model `{}` is a folder: where it lies, `base_model_name_or_path` in adapter_config.json says; "
    "on another machine, write its path there."
)


def push_adapter(adapter: Path, repository: str) -> str:
    """Upload the adapter's folder to the Hub and return its address; a new repository is private.

    A base that is a folder of this machine is named there without its path. Raises AlpacaError where the Hub refuses,
    or is out of reach.
    """
    try:
        name = create_repo(repository, private=True, exist_ok=True).repo_id
        with TemporaryDirectory() as temporary:
            copy = shutil.copytree(adapter, Path(temporary) / "adapter", ignore=shutil.ignore_patterns(CARD))
            config = PeftConfig.from_pretrained(copy)
            name_base(copy, published(config.base_model_name_or_path), config.revision)
            write_checksums(copy)
            shutil.copy(adapter / CARD, copy)
            return str(upload_folder(repo_id=name, folder_path=copy, commit_message="LoRA adapter and model card"))
    except Exception as error:  # the library's exceptions differ from release to release
        what = f"The adapter was not pushed to {repository} ({first_line(error)}): it is whole on disk"
        remedy = "log in with `hf auth login` and check the name (owner/name) and the network"
        raise AlpacaError(f"{what}; {remedy}.", "push-refused") from error


def published(path: str) -> str:
    """Return the name of a model or dataset for others to read: of a folder of this machine its name alone."""
    return Path(portable(path)).name if Path(portable(path)).is_absolute() else portable(path)


def save_metrics(folder: Path, metrics: dict) -> None:
    """Write the run's metrics.json, with what its adapter was made by, and the adapter's card, now with its metrics."""
    made = read_record(folder, "adapter")
    about = {"profile": made["name"], "recipe": made["recipe"], "seed": made["seed"], "adapter": made["sha256"]}
    with lock_run(folder):
        write_json(folder / "metrics.json", metrics | about)
        write_card(folder)


def write_card(folder: Path) -> None:
    """Write the model card of the run's adapter, from the run's manifest and this adapter's metrics, if any."""
    made = read_record(folder, "adapter")
    metrics: dict = {}
    with suppress(AlpacaError):  # there are none yet, or of an earlier version, or cut: notebook 04 writes new ones
        metrics = read_metrics(folder)
    measured = metrics if metrics.get("adapter") == made["sha256"] else {}
    write_text(folder / "adapter" / "README.md", model_card(made, measured))


def model_card(training: dict, metrics: dict) -> str:
    """Return the model card in Markdown, made of the manifest's record of the adapter and of its metrics, if any."""
    training = training | {key: published(training[key]) for key in ("model", "dataset")}
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
        + ["## Load it", ""]
        + [FOLDER_BASE.format(training["model"]), ""] * (not training["model_revision"])
        + ["```python", *LOADING, "```", ""]
        + ["## What made it", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
        + ["## What it reached on held-out rows", "", *_table(metrics), ""]
        + ["## Licence of the data", "", licence, ""]
    )


def _table(metrics: dict) -> list[str]:
    """Return the lines of a table of the metrics, base against tuned."""
    if not metrics:
        return ["Not measured yet: notebook 04 does it."]
    base, tuned = metrics["base"], metrics["tuned"]
    numbers = [name for name, value in base.items() if isinstance(value, int | float) and name in tuned]
    rows = [f"| {name} | {base[name]:.3g} | {tuned[name]:.3g} |" for name in numbers]
    return [f"| {metrics['n']} rows | base | tuned |", "|---|---:|---:|", *rows]
