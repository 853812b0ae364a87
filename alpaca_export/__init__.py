"""Take the assistant elsewhere: merged into a model that needs no peft, as GGUF for llama.cpp, its adapter on the Hub.

It imports `alpaca_helpers`, which never imports it; `python -m alpaca_export --help` exports a finished run.
"""

from pathlib import Path
from types import SimpleNamespace

from alpaca_helpers.checkpoints import is_main_process
from alpaca_helpers.models import load_base, load_tokenizer
from alpaca_helpers.run import Run

from .llama_cpp import save_gguf
from .merged import save_merged
from .push import push_adapter


def export(folder: Path, settings: SimpleNamespace) -> None:
    """Do what the parameters ask for: write the run's `merged` model, also as `gguf`; `push_to` the Hub its adapter.

    Errors as in `save_gguf` and `push_adapter`.
    """
    if not is_main_process():
        return
    if settings.merged or settings.gguf:
        base, tokenizer = (load(settings.model, settings.model_revision) for load in (load_base, load_tokenizer))
        with Run(folder).lock():
            save_merged(base, tokenizer, folder / "adapter", folder / "merged")
            if settings.gguf:
                save_gguf(folder)
    if settings.push_to:
        print(push_adapter(folder / "adapter", settings.push_to))
