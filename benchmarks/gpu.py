"""The whole series as on a GPU runtime, in one call: figures to benchmarks/gpu.json, or a sentence on what is wrong.

    python benchmarks/gpu.py                                          # the true shape; wants a GPU
    python benchmarks/gpu.py --layers 2 --width 64 --heads 2 --max-train-rows 200 --out /tmp/gpu.json   # a rehearsal

A stand-in Hub on loopback serves a model of gpt2-medium's shape with random weights and 52,002 rows in Alpaca's form,
so no network is needed; real rows and GPT-2's vocabulary come from --data (see tests/support/hub.py). The four
notebooks run by papermill; they are killed in the middle of the training, and started again.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import TrainerState

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from support.hub import stand_in  # noqa: E402

from alpaca_helpers.cells import NOTEBOOKS, read_cells  # noqa: E402
from alpaca_helpers.checkpoints import last_complete_checkpoint  # noqa: E402
from alpaca_helpers.config import choose_profile  # noqa: E402
from alpaca_helpers.files import verify_checksums, write_json  # noqa: E402
from alpaca_helpers.run import Run  # noqa: E402

LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub")

NEEDS_A_MODEL_THAT_LEARNS = "verdict("  # in a cell whose output random weights cannot give


def used_bytes(process: psutil.Process) -> int:
    """Return the bytes that the GPU has in use, or without one those that the process and all below it hold."""
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        used = subprocess.run(query, check=False, capture_output=True, text=True).stdout.split()
        return int(used[0]) * 2**20 if used else 0
    total = 0
    with suppress(psutil.NoSuchProcess):  # it ended meanwhile
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    return total


def kill(process: psutil.Process) -> None:
    """Kill a process and all below it."""
    process.suspend()  # or it would start another kernel, and see this one die
    for each in (*process.children(recursive=True), process):
        with suppress(psutil.NoSuchProcess):  # it ended by itself
            each.kill()


def series(run: Path, environment: dict, given: list[str], kill_when=lambda: False) -> tuple[dict[str, dict], list]:
    """Run the series into `run` and return seconds and peak memory by notebook, and the lines of its training.

    Args:
        kill_when: a function of no arguments; once it is true, the series and its kernel are killed.

    Raises SystemExit with the series' last line if it fails.
    """
    command = [sys.executable, "-m", "alpaca_helpers.series", "--run", str(run), *given]
    log, parts, printed, killed = run.with_suffix(".log"), {}, "", False
    with log.open("w", encoding="utf-8") as output, log.open(encoding="utf-8") as lines:
        process = psutil.Popen(command, env=environment, cwd=PROJECT, stdout=output, stderr=subprocess.STDOUT)
        running, before = True, time.monotonic()
        while running:
            time.sleep(0.05)
            running, now = process.poll() is None, time.monotonic()
            print(new := lines.read(), end="", flush=True)
            printed += new
            if names := re.findall(r"^\[\d/4\] (\w+)\n", printed, re.MULTILINE):  # those that are not unchanged
                part = parts.setdefault(names[-1], {"seconds": 0.0, "peak_gb": 0.0})
                part["seconds"] += now - before
                part["peak_gb"] = max(part["peak_gb"], used_bytes(process) / 1e9)
            before = now
            if running and not killed and kill_when():
                kill(process)
                killed = True
    if process.returncode and not killed:
        sys.exit(f"The series failed: {printed.strip().splitlines()[-1]}")
    for name, part in parts.items():
        parts[name] = {"seconds": round(part["seconds"], 1), "peak_gb": round(part["peak_gb"], 2)}
        print("{}: {seconds} s, {peak_gb} GB".format(name, **parts[name]), flush=True)
    return parts, [line.strip() for line in printed.splitlines() if "rows a second" in line]


def checkpoints(run: Path) -> list[str]:
    """Return the names of the run's checkpoints that are written to the end."""
    return sorted(path.name for path in run.glob("checkpoints/*") if not verify_checksums(path))


def losses(run: Path) -> list[float]:
    """Return the training losses of the run's newest checkpoint, in order."""
    checkpoint = last_complete_checkpoint(run / "checkpoints")
    history = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    return [entry["loss"] for entry in history if "loss" in entry]


def unlike_the_stored(run: Path) -> list[str]:
    """Return the cells tagged `every-profile` that did not print in `run` what the project's notebooks show."""

    def shown(notebook: Path) -> dict[str, str]:
        texts = {}
        for cell in read_cells(notebook, "every-profile"):
            outputs = [output for output in cell["outputs"] if output.get("name") != "stderr"]
            lines = [output["text"] if "text" in output else output["data"]["text/plain"] for output in outputs]
            texts[cell["source"]] = "".join(map("".join, lines))
        return texts

    unlike = []
    for notebook in NOTEBOOKS:
        fresh = shown(run / notebook.name)
        for cell, stored in shown(notebook).items():
            if NEEDS_A_MODEL_THAT_LEARNS not in cell and fresh.get(cell) != stored:
                unlike.append(f"{cell}\n{fresh.get(cell)}")
    return unlike


def measure(o: argparse.Namespace, folder: Path) -> None:
    """Run the series in `folder`, write the figures, and exit with what is wrong, if something is."""
    run, gpu, chosen = folder / "run", torch.cuda.is_available(), choose_profile("auto").name
    given = ["--profile", "auto" if gpu else "gpt2-medium", *(word for pair in o.p for word in ("-p", *pair))]
    if o.max_train_rows:
        given += ["-p", "max_train_rows", str(o.max_train_rows)]
    print("Writing the stand-in's model and rows", flush=True)
    with stand_in(folder / "repositories", o.data, layers=o.layers, width=o.width, heads=o.heads) as hub:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        killed, begun = series(run, environment, given, kill_when=lambda: len(checkpoints(run)) > 1)
        kept, finished_before = checkpoints(run), (run / "metrics.json").exists()
        again, went_on = series(run, environment, given)
    printed = "".join(path.read_text(encoding="utf-8") for path in run.glob("0*.ipynb"))
    resumed = "Going on after step" in printed
    curve, training, unlike = losses(run), Run(run).manifest()["training"], unlike_the_stored(run)
    trained = sum(weight.numel() for weight in load_file(run / "adapter" / "adapter_model.safetensors").values())
    expected = o.layers * training["lora_rank"] * (o.width + 3 * o.width)
    figures = {
        "device": torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}: a rehearsal, not a GPU figure",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "shape": {"layers": o.layers, "width": o.width, "heads": o.heads},
        "train_rows": load_from_disk(run / "data")["train"].num_rows,
        "epochs": training["num_train_epochs"],
        "profile_of_auto": chosen,
        "precision": training["dtype"],
        "parts": {"until killed": killed, "again": again},
        "training": begun + went_on,
        "trainable_parameters": trained,
        "loss": {"first": curve[0], "last": curve[-1]},
        "killed_and_resumed": {"checkpoints_at_the_kill": kept, "went_on": resumed},
        "downloads": [line for line in hub.log if line.startswith("GET /cdn/")],
        "metrics": Run(run).metrics(),
    }
    write_json(o.out, figures)
    print(json.dumps(figures, indent=2))
    checks = [
        (trained == expected, f"{trained:,} parameters were trained, not {expected:,}"),
        (curve[-1] < curve[0], f"the loss did not fall: {curve}"),
        (not unlike, f"cells that hold for every model came out otherwise: {unlike}"),
        (chosen == "gpt2-medium" or not gpu, "auto did not choose gpt2-medium on a GPU"),
        (kept and not finished_before, "the run was not killed during its training"),
        (resumed, "the killed run did not go on from its checkpoint"),
    ]
    if wrong := [sentence for right, sentence in checks if not right]:
        sys.exit("; ".join(wrong))


def main() -> None:
    """Run the command line."""
    data = os.environ.get("ALPACA_TEST_DATA", PROJECT.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--data", type=Path, default=data, help="folder with real rows and GPT-2's vocabulary")
    parser.add_argument("--max-train-rows", type=int, help="train on fewer rows (a rehearsal)")
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks" / "gpu.json")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="for the notebooks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
