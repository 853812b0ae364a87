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
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import nbformat
import torch
from datasets import load_from_disk
from safetensors import safe_open

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from support.hub import stand_in  # noqa: E402

from alpaca_helpers.cells import NOTEBOOKS  # noqa: E402
from alpaca_helpers.checkpoints import last_complete_checkpoint  # noqa: E402
from alpaca_helpers.config import choose_profile  # noqa: E402
from alpaca_helpers.files import verify_checksums, write_json  # noqa: E402
from alpaca_helpers.run import Run  # noqa: E402

LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub")

NEEDS_A_MODEL_THAT_LEARNS = "verdict("  # in a cell whose output random weights cannot give


class Memory:
    """Watches a process, twice a second while it runs: what the GPU has in use, or without one its tree's memory."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.peak, self.lock = process, 0, threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            used = gpu_bytes() if torch.cuda.is_available() else sum(process_tree(self.process.pid).values())
            with self.lock:
                self.peak = max(self.peak, used)
            time.sleep(0.5)

    def taken(self) -> int:
        """Return the peak in bytes since the last call."""
        with self.lock:
            peak, self.peak = self.peak, 0
        return peak


def gpu_bytes() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    used = subprocess.run(query, check=False, capture_output=True, text=True).stdout.split()
    return int(used[0]) * 2**20 if used else 0


def process_tree(root: int) -> dict[int, int]:
    """Return the resident bytes of a process and all below it, by process number; a kernel has a session of its own."""
    parents, resident = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # from the third on: state, parent, …
        except OSError:  # it ended meanwhile
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        resident[int(stat.parent.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    tree = {root} & resident.keys()
    while more := {process for process, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return {process: resident[process] for process in tree}


def series(run: Path, environment: dict, given: list[str], kill_when=None) -> tuple[dict[str, dict], list[str]]:
    """Run the series into `run` and return seconds and peak memory by notebook, and the lines of its training.

    Args:
        kill_when: a function of no arguments; once it is true, the series and its kernel are killed.

    Raises SystemExit with the series' last lines if it fails.
    """
    command = [sys.executable, "-m", "alpaca_helpers.series", "--run", str(run), *given]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, cwd=PROJECT, **pipes)
    memory, parts, printed, part, begun = Memory(process), {}, [], "", time.monotonic()
    killed = threading.Event()

    def watch() -> None:
        while not kill_when():
            if process.poll() is not None:
                return
            time.sleep(0.05)
        killed.set()
        os.kill(process.pid, signal.SIGSTOP)  # or it would start another kernel, and see this one die
        for child in process_tree(process.pid):
            with suppress(ProcessLookupError):  # it ended by itself
                os.kill(child, signal.SIGKILL)

    if kill_when:
        threading.Thread(target=watch, daemon=True).start()

    def close() -> None:
        if part:
            parts[part] = {"seconds": round(time.monotonic() - begun, 1), "peak_gb": round(memory.taken() / 1e9, 2)}
            print("{}: {seconds} s, {peak_gb} GB".format(part, **parts[part]), flush=True)

    for line in process.stdout:
        printed.append(line)
        print(line, end="", flush=True)
        if line.startswith("[") and "/4] " in line and ": unchanged" not in line:
            close()
            part, begun = line.split("] ")[1].strip(), time.monotonic()
            memory.taken()
    if process.wait() and not killed.is_set():
        sys.exit(f"The series failed: {''.join(printed).strip().splitlines()[-1]}")
    close()
    return parts, [line.strip() for line in printed if "rows a second" in line]


def checkpoints(run: Path) -> list[str]:
    """Return the names of the run's checkpoints that are written to the end."""
    return [path.name for path in run.glob("checkpoints/*") if not verify_checksums(path)]


def losses(run: Path) -> list[float]:
    """Return the training losses of the run's newest checkpoint, in order."""
    history = json.loads((last_complete_checkpoint(run / "checkpoints") / "trainer_state.json").read_text())[
        "log_history"
    ]
    return [entry["loss"] for entry in history if "loss" in entry]


def trained_parameters(run: Path) -> int:
    with safe_open(run / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no dict)
    return sum(rows * columns for rows, columns in sizes)


def unlike_the_stored(run: Path) -> list[str]:
    """Return the cells tagged `every-profile` that did not print in `run` what the project's notebooks show."""

    def shown(notebook: Path) -> dict[str, str]:
        cells = nbformat.read(notebook, as_version=4).cells
        cells = [cell for cell in cells if "every-profile" in cell.metadata.get("tags", [])]
        return {
            cell.source: "".join(
                out.text if out.output_type == "stream" else out.data["text/plain"]
                for out in cell.outputs
                if out.get("name") != "stderr"
            )
            for cell in cells
        }

    stored, fresh = {}, {}
    for notebook in NOTEBOOKS:
        stored |= shown(notebook)
        fresh |= shown(run / notebook.name)
    return [cell for cell in stored if NEEDS_A_MODEL_THAT_LEARNS not in cell and fresh.get(cell) != stored[cell]]


def main() -> None:
    data = os.environ.get("ALPACA_TEST_DATA", PROJECT.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--data", type=Path, default=data, help="folder with real rows and GPT-2's vocabulary")
    parser.add_argument("--max-train-rows", type=int, help="train on fewer rows (a rehearsal)")
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks" / "gpu.json")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="for the notebooks")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        measure(o, Path(folder))


def measure(o: argparse.Namespace, folder: Path) -> None:
    """Run the series in `folder`, write the figures, and exit with what is wrong, if something is."""
    run, gpu, chosen = folder / "run", torch.cuda.is_available(), choose_profile("auto").name
    given = ["--profile", "auto" if gpu else "gpt2-medium", *(word for pair in o.p for word in ("-p", *pair))]
    if o.max_train_rows:
        given += ["-p", "max_train_rows", str(o.max_train_rows)]
    print("Writing the stand-in's model and rows", flush=True)
    with stand_in(folder / "repositories", o.data, layers=o.layers, width=o.width, heads=o.heads) as hub:
        away = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | away
        environment |= {"PATH": path}
        killed, begun = series(run, environment, given, kill_when=lambda: len(checkpoints(run)) > 1)
        kept, finished_before = sorted(checkpoints(run)), (run / "metrics.json").exists()
        again, went_on = series(run, environment, given)
    printed = "".join(path.read_text(encoding="utf-8") for path in run.glob("0*.ipynb"))
    curve, manifest, unlike = losses(run), Run(run).manifest(), unlike_the_stored(run)
    expected = o.layers * manifest["training"]["lora_rank"] * (o.width + 3 * o.width)
    figures = {
        "device": torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}: a rehearsal, not a GPU figure",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "shape": {"layers": o.layers, "width": o.width, "heads": o.heads},
        "train_rows": load_from_disk(run / "data")["train"].num_rows,
        "epochs": manifest["training"]["num_train_epochs"],
        "profile_of_auto": chosen,
        "precision": manifest["training"]["dtype"],
        "parts": {"until killed": killed, "again": again},
        "training": begun + went_on,
        "trainable_parameters": trained_parameters(run),
        "loss": {"first": curve[0], "last": curve[-1]},
        "killed_and_resumed": {"checkpoints_at_the_kill": kept, "went_on": "Going on after step" in printed},
        "downloads": [line for line in hub.log if line.startswith("GET /cdn/")],
        "metrics": json.loads((run / "metrics.json").read_text()),
    }
    wrong = [
        sentence
        for sentence, right in {
            f"{figures['trainable_parameters']:,} parameters were trained, not {expected:,}": figures[
                "trainable_parameters"
            ]
            == expected,
            f"the loss did not fall: {curve}": curve[-1] < curve[0],
            f"cells that hold for every model came out otherwise: {unlike}": not unlike,
            "auto did not choose gpt2-medium on a GPU": chosen == "gpt2-medium" or not gpu,
            "the run was not killed during its training": kept and not finished_before,
            "the killed run did not go on from its checkpoint": figures["killed_and_resumed"]["went_on"],
        }.items()
        if not right
    ]
    write_json(o.out, figures)
    print(json.dumps(figures, indent=2))
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
