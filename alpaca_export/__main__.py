"""Export a finished run: `python -m alpaca_export --help`."""

import argparse
from types import SimpleNamespace

from alpaca_helpers.config import check_parameters
from alpaca_helpers.console import run_command
from alpaca_helpers.run import Run

from . import export


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alpaca_export", description="Write a finished run's model as one file for llama.cpp."
    )
    parser.add_argument("run", metavar="RUN", help="name of the run, or a path to its folder")
    run = Run.named(check_parameters({"run": parser.parse_args().run})["run"], make=False)
    folder, made = run.folder, run.record("adapter")
    about = {"model": made["model"], "model_revision": made["model_revision"]}
    export(folder, SimpleNamespace(**about, merged=True, gguf=True, push_to=""))
    print(f"{folder / folder.name}.gguf is written, and a Modelfile for Ollama beside it.")


if __name__ == "__main__":
    run_command(main)
