"""All that a GPU is wanted for, in one call that keeps to a time limit: `python -m benchmarks.on_gpu --help`.

Each part is a command of its own. It writes its figures to a file of its own in the folder given, so what is measured
is kept whatever comes after; a part for which the time left is too short is left out, with a line.

    python -m benchmarks.on_gpu --out figures --limit 560 --parts gradients race-16 race-256 generation patches
    python -m benchmarks.on_gpu --out figures --limit 560 --parts series
    python -m benchmarks.on_gpu --out figures --rehearse        # on a CPU, with the pocket: that all of it runs
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BENCH = ["-m", "benchmarks.bench", "--models", "gpt2-medium", "--rounds", "2", "--sections"]
RACE = [*BENCH, "matrix_product", "training", "--contenders"]

# By name: the command, and about how many seconds it takes on an H100 or H200.
PARTS = {
    "gradients": ([*BENCH, "gradients"], 60),
    "race-16": ([*RACE, "document", "TRL", "TRL packed", "ours", "graphed", "--batch-sizes", "16"], 120),
    "compiled": ([*RACE, "ours", "compiled", "--batch-sizes", "16"], 90),
    "race-128": ([*RACE, "document", "TRL", "ours", "graphed", "--batch-sizes", "128"], 150),
    "race-256": ([*RACE, "document", "TRL", "ours", "graphed", "--batch-sizes", "256"], 150),
    "packed": ([*RACE, "ours", "packed", "--batch-sizes", "256"], 120),
    "float16": ([*RACE, "ours", "ours, float16", "--batch-sizes", "16"], 60),
    "generation": ([*BENCH, "generation"], 60),
    "patches": (["-m", "benchmarks.speedups", "--models", "gpt2-medium", "--rounds", "2"], 120),
    "series": (["benchmarks/gpu.py"], 400),
}
TINY = ["--models", "pocket", "--rounds", "1", "--steps", "2"]  # for a rehearsal, after the options it replaces
REHEARSED = {  # `series` is rehearsed by the tests of the stand-in Hub
    "gradients": TINY,
    "race-16": [*TINY, "--sections", "training", "--contenders", "ours", "graphed", "packed"],
    "generation": TINY,
    "patches": TINY,
}


def main() -> None:
    """Run the command line; the exit status is 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts' files and output")
    parser.add_argument("--limit", type=float, default=560, help="seconds for all (560)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="in this order (all)")
    parser.add_argument("--rehearse", action="store_true", help=f"{', '.join(REHEARSED)} at their smallest")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    ends, failed = time.monotonic() + options.limit, []
    for name in REHEARSED if options.rehearse else options.parts:
        command, seconds = PARTS[name]
        left = ends - time.monotonic()
        if left < (0 if options.rehearse else seconds):
            print(f"{name}: left out, {left:.0f} s are left", flush=True)
            continue
        given = [sys.executable, *command, "--out", str(options.out.resolve() / f"{name}.json")]
        given += REHEARSED[name] if options.rehearse else []
        print(f"{name} …", flush=True)
        begun = time.monotonic()
        with (options.out / f"{name}.log").open("w", encoding="utf-8") as log:
            try:
                done = subprocess.run(
                    given, check=False, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT, timeout=left
                )
                ended = f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                ended = "cut at the limit"
        failed += [name] if ended != "exit status 0" else []
        print(f"{name}: {ended} after {time.monotonic() - begun:.0f} s", flush=True)
    sys.exit(f"Failed: {', '.join(failed)}: see their .log in {options.out}." if failed else 0)


if __name__ == "__main__":
    main()
