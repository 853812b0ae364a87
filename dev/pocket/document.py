"""Tune the pocket with the document's recipe and ship the run, which notebook 04 compares with: `make pocket`."""

import shutil

from alpaca_helpers import portable
from alpaca_helpers.cells import NOTEBOOKS
from alpaca_helpers.console import run_command
from alpaca_helpers.files import atomic_folder, write_checksums, write_json
from alpaca_helpers.lora import name_base
from alpaca_helpers.pocket import DOCUMENT, MODEL
from alpaca_helpers.run import Run
from alpaca_helpers.series import run_series

SHIPPED = ("adapter_config.json", "adapter_model.safetensors", "base.json")  # the tokenizer is the pocket's


def main() -> None:
    """Run notebooks 02 and 03 with the recipe `document`, and ship the adapter with the record of what made it."""
    folder = run_series({"profile": "pocket", "recipe": "document", "run": "document"}, NOTEBOOKS[1:3])
    adapter, record = Run(folder).artifact("adapter"), Run(folder).record("adapter")
    with atomic_folder(DOCUMENT, checksums=False) as part:
        (part / "adapter").mkdir()
        for name in SHIPPED:
            shutil.copy(adapter / name, part / "adapter" / name)
        name_base(part / "adapter", portable(str(MODEL)))  # without this machine's path
        write_checksums(part / "adapter")
        write_json(part / "manifest.json", {"adapter": record})
    print(f"The adapter is in {DOCUMENT}.")


if __name__ == "__main__":
    run_command(main, "Interrupted: the same command goes on from there.")
