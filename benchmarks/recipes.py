"""What each choice buys: the series over a grid of recipes and LoRA ranks, and the table of any finished runs.

    python -m benchmarks.recipes            run the grid on the pocket, two runs at a time: runs/recipes.md, .json, .png
    python -m benchmarks.recipes RUN RUN …  print the table of these finished runs

A sweep that was interrupted goes on where it was: finished runs are left alone. Runs that differ in nothing but their
seed are one line of the table, with the mean over seeds and the standard deviation.
"""

import argparse
import json
import os
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import nbformat
from matplotlib.figure import Figure
from tqdm import tqdm

from alpaca_helpers import AlpacaError
from alpaca_helpers.cells import NOTEBOOKS
from alpaca_helpers.checkpoints import FREE
from alpaca_helpers.console import run_command
from alpaca_helpers.data import RECIPES
from alpaca_helpers.files import write_json
from alpaca_helpers.metrics import METRICS, Metric
from alpaca_helpers.run import Run
from alpaca_helpers.series import run_series
from alpaca_lessons.plots import BLUE, INK, PALE, in_style

PROJECT = Path(__file__).resolve().parents[1]

SEEDS = (0, 1, 2)
RANKS = (1, 2, 4, 8, 16, 32)
AT_ONCE = 2  # runs, with a thread each
SETTINGS = {
    "profile": "pocket",
    "num_train_epochs": 4,  # not the ten of the profile, and a third of the held-out rows: thirty runs took 15 minutes
    "max_heldout_rows": 100,
    "resume": False,  # a training that goes on would not tell its seconds
}
SHOWN = {
    "contains": METRICS["contains"],
    "exact_match": METRICS["exact_match"],
    "stop_rate": METRICS["stop_rate"],
    "mean_answer_tokens": METRICS["mean_answer_tokens"],
    "seconds": Metric("training", "seconds", 0),
}
SAME = FREE | {"seed", "fingerprint", "result"}  # what runs of one line may differ in


def grid() -> dict[str, dict[str, object]]:
    """Return the sweep's runs, name to notebook parameters: each recipe, and the recipe `answers` with each rank.

    Alpha is twice the rank throughout, as in the document's 8 and 16, so that the correction's scale stays the same.
    """
    ranked = {f"rank {rank}": {"recipe": "answers", "lora_rank": rank, "lora_alpha": 2 * rank} for rank in RANKS}
    choices = {recipe: {"recipe": recipe, "lora_rank": 8, "lora_alpha": 16} for recipe in RECIPES} | ranked
    del choices["rank 8"]  # the recipe `answers` itself
    return {
        f"{name} seed {seed}".replace(" ", "-"): {**choice, "seed": seed}
        for seed in SEEDS
        for name, choice in choices.items()
    }


def sweep(folder: Path, runs: dict[str, dict[str, object]]) -> list[Path]:
    """Run notebooks 02 to 04 for each of `runs`, finished ones excepted, and return the runs' folders.

    Raises AlpacaError for a run that fails, with the place of its log; those that wait are not begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # the kernels inherit it
    folders = [folder / name for name in runs]
    with ProcessPoolExecutor(AT_ONCE, mp_context=get_context("spawn")) as pool:
        list(tqdm(pool.map(run_one, folders, runs.values()), total=len(runs), desc="runs", unit="run"))
    return folders


def run_one(folder: Path, parameters: dict[str, object]) -> None:
    """Run notebooks 02 to 04 into the run's folder; what they print goes into a log beside it."""
    with open(f"{folder}.log", "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            run_series(SETTINGS | parameters | {"run": str(folder)}, NOTEBOOKS[1:])
        except AlpacaError as error:
            raise AlpacaError(f"The run {folder.name} failed ({error}): see {log.name}, then go on.") from error


def read_run(folder: Path) -> tuple[dict[str, object], dict[str, float | None]]:
    """Return a finished run's settings and what it came to.

    Raises AlpacaError if the run is not finished.
    """
    metrics = json.loads(Run(folder).artifact("metrics.json").read_text(encoding="utf-8"))
    settings = Run(folder).manifest().get("training", {}) | {"recipe": metrics["recipe"]}
    tuned = {name: metrics["tuned"][name] for name in SHOWN if name != "seconds"}
    return settings, tuned | {"seconds": training_seconds(folder)}


def training_seconds(folder: Path) -> float | None:
    """Return how long the cell that trains took, as papermill noted it; None where no papermill executed it."""
    for notebook in folder.glob("*.ipynb"):
        for cell in nbformat.read(notebook, as_version=4).cells:
            if cell.cell_type == "code" and "trainer.train(" in cell.source:
                return cell.metadata.get("papermill", {}).get("duration")
    return None


def summarize(folders: Iterable[Path]) -> list[dict]:
    """Return a line for each choice of settings, in the order of `folders`.

    A line holds `choice` (the settings in which the lines differ), `seeds`, and under each name of `SHOWN` the `mean`
    and `spread` (standard deviation; None for one seed) over the seeds' `values`.
    """
    groups: dict[str, list] = {}
    for folder in folders:
        settings, values = read_run(folder)
        key = json.dumps({name: value for name, value in settings.items() if name not in SAME}, sort_keys=True)
        groups.setdefault(key, []).append((settings, values))
    choices = [json.loads(key) for key in groups]
    varying = [name for name in choices[0] if any(choice[name] != choices[0][name] for choice in choices)]
    varying = ["recipe"] + [name for name in varying if name != "recipe"]
    lines = []
    for choice, runs in zip(choices, groups.values()):
        line = {"choice": {name: choice[name] for name in varying}, "seeds": [settings["seed"] for settings, _ in runs]}
        for name in SHOWN:
            values = [run[name] for _, run in runs if run[name] is not None]
            line[name] = {
                "mean": statistics.fmean(values) if values else None,
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "values": values,
            }
        lines.append(line)
    return lines


def markdown(lines: Sequence[dict]) -> str:
    """Return the summary as a Markdown table."""
    head = [name.replace("_", " ") for name in lines[0]["choice"]] + ["seeds"]
    head += [metric.heading for metric in SHOWN.values()]
    table = [head, ["---"] * len(head)]
    for line in lines:
        cells = [str(value) for value in line["choice"].values()] + [str(len(line["seeds"]))]
        for name, metric in SHOWN.items():
            cell, spread = metric.show(line[name]["mean"]), line[name]["spread"]
            cells.append(cell if spread is None else f"{cell} ± {metric.show(spread).rstrip('%')}")
        table.append(cells)
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n" for cells in table)


@in_style
def draw(lines: Sequence[Mapping], metrics: Mapping[str, Metric]) -> Figure:
    """Return what each choice of settings came to: a dot a seed, a bar at their mean, a panel a metric.

    Args:
        lines: a mapping a choice, with `choice` and for each metric its `mean` and `values`.
        metrics: the metrics to show, with their names.
    """
    names = [_choice(line["choice"]) for line in lines]
    shown = [name for name in metrics if all(line[name]["values"] for line in lines)]
    figure = Figure(figsize=(10, 0.32 * len(lines) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown):
        metric = metrics[name]
        scale = 100 if metric.unit == "%" else 1
        for y, line in enumerate(lines):
            values = [scale * value for value in line[name]["values"]]
            axes.barh(y, scale * line[name]["mean"], 0.7, facecolor=PALE, edgecolor=INK, linewidth=0.8)
            axes.plot(values, [y] * len(values), "o", color=BLUE, markeredgecolor="white", markersize=5, clip_on=False)
        axes.set_xlim(0, 105 if scale == 100 else None)
        axes.set_xlabel(f"{textwrap.fill(metric.label, 14)}\n({metric.unit})")
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    return figure


def _choice(choice: Mapping[str, object]) -> str:
    return ", ".join(
        str(value) if name == "recipe" else f"{name.removeprefix('lora_').replace('_', ' ')} {value}"
        for name, value in choice.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="finished runs to compare: names, or paths to their folders")
    names = parser.parse_args().runs
    if names:
        folders = [Path(name) if os.sep in name else PROJECT / "runs" / name for name in names]
        return print(markdown(summarize(folders)), end="")
    out = PROJECT / "runs"
    lines = summarize(sweep(out / "recipes", grid()))
    write_json(out / "recipes.json", {"lines": lines})
    (out / "recipes.md").write_text(markdown(lines), encoding="utf-8")
    draw(lines, SHOWN).savefig(out / "recipes.png")
    print(markdown(lines))
    print(f"The table is in {out / 'recipes.md'} and recipes.json, the picture in {out / 'recipes.png'}.")


if __name__ == "__main__":
    run_command(main, "Interrupted: finished runs are kept, and the same command goes on from there.")
