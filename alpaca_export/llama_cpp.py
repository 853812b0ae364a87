"""A run's merged model as one file for llama.cpp, and its settings for Ollama."""

import os
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from alpaca_helpers import AlpacaError
from alpaca_helpers.files import check_disk_space, content_hash, in_the_way
from alpaca_helpers.models import positions
from alpaca_helpers.prompts import format_prompt
from alpaca_helpers.run import Run

OLLAMA_CONTEXT = 4096  # tokens at most in a Modelfile: Ollama takes the memory for all of them at once


def save_gguf(folder: Path) -> None:
    """Write the run's merged model as `<run>.gguf`, in float32, and a Modelfile for Ollama beside it.

    Raises AlpacaError where the package gguf is missing, for a model as in `write_gguf`, and for a file in the way
    that the run's manifest does not record.
    """
    try:
        from .gguf import write_gguf  # here, since the package gguf is an extra
    except ModuleNotFoundError as error:
        raise AlpacaError("The package gguf is not installed: `pip install gguf==0.19.0`, and try again.") from error
    merged, path, modelfile = folder / "merged", folder / f"{folder.name}.gguf", folder / "Modelfile"
    parts = {place: place.with_name(f".alpaca-{place.name}.part") for place in (path, modelfile)}
    recorded = Run(folder).manifest().get("gguf", {})
    for place in parts:
        if os.path.lexists(place) and content_hash(place) != recorded.get(place.name):
            raise in_the_way(place)
    with check_disk_space(folder, needed=sum(file.stat().st_size for file in merged.iterdir())):
        try:
            write_gguf(merged, parts[path])
            parts[modelfile].write_text(ollama_settings(merged, path.name), encoding="utf-8")
            for place in parts:  # before the new ones are recorded: whenever it is cut, none is there that is not
                place.unlink(missing_ok=True)
            Run(folder).write_record("gguf", {place.name: content_hash(part) for place, part in parts.items()})
            for place, part in parts.items():
                part.rename(place)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)


def ollama_settings(merged: Path, file: str) -> str:
    """Return the Modelfile with which Ollama asks the model in `file` in the prompt's form, and greedily."""
    tokenizer, settings = AutoTokenizer.from_pretrained(merged), GenerationConfig.from_pretrained(merged)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    context = min(positions(AutoConfig.from_pretrained(merged)), OLLAMA_CONTEXT)
    lines = [f"FROM ./{file}", f'TEMPLATE """{format_prompt("{{ .Prompt }}")}"""']
    lines += [f'PARAMETER stop "{token}"' for token in tokenizer.convert_ids_to_tokens(ends)]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}", "PARAMETER temperature 0", ""])
