"""A run's model for other programs: merged into one that needs no peft, as GGUF for llama.cpp, on the Hub.

`python -m alpaca_helpers.export --help` writes the GGUF of a finished run.
"""

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from . import AlpacaError
from .card import push_adapter
from .checkpoints import is_main_process
from .config import check_parameters
from .console import run_command
from .files import atomic_folder, check_disk_space, content_hash, in_the_way, write_json
from .generation import end_tokens
from .lora import TOKENIZER_BYTES, finish_tokenizer, load_adapter
from .models import load_base, load_tokenizer, positions
from .prompts import format_prompt
from .run import Run

OLLAMA_CONTEXT = 4096  # tokens at most in a Modelfile: Ollama takes the memory for all of them at once


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


def save_merged(base, tokenizer, adapter: Path, folder: Path) -> None:
    """Write `base` with the adapter's correction added to its weights: a plain model that needs no peft.

    The fresh `base` is changed; in float32 the merged logits equal the adapter's to 1e-4. Generation settings are
    the end and padding tokens and the context, without the base's sampling; the tokenizer is as in `finish_tokenizer`.
    """
    merged = load_adapter(base, adapter).merge_and_unload()
    merged.generation_config = generation_settings(base, tokenizer)
    size = sum(value.numel() * value.element_size() for value in merged.parameters())
    with atomic_folder(folder, needed=size + TOKENIZER_BYTES) as part:
        merged.save_pretrained(part)
        tokenizer.save_pretrained(part)
        finish_tokenizer(part)
        finish_config(part)


def finish_config(folder: Path) -> None:
    """Write rotary positions into the configuration of the model in `folder` in the words of transformers 4 too.

    It would take its own default for what transformers 5 writes in another place, and answer otherwise in silence.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters", {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        write_json(folder / "config.json", config)


def generation_settings(model, tokenizer) -> GenerationConfig:
    """Return the settings for whoever generates elsewhere: the end and padding tokens, and the context as the length.

    Nothing of the base's sampling. Without the length, `pipeline` would write 256 new tokens after any prompt.
    """
    ends, limit = end_tokens(model, tokenizer), positions(model.config)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        max_length=limit if limit < 2**31 - 1 else None,
    )


def save_gguf(folder: Path) -> None:
    """Write the run's merged model as `<run>.gguf`, in float32, and a Modelfile for Ollama beside it.

    Raises AlpacaError where the package gguf is missing, for a model as in `write_gguf`, and for a file in the way
    that the run's manifest does not record.
    """
    try:
        from .gguf import write_gguf  # here, since the package gguf is an extra
    except ModuleNotFoundError as error:
        what = "The package gguf is not installed: `pip install gguf==0.19.0`, and run this again."
        raise AlpacaError(what) from error
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


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alpaca_helpers.export", description="Write a finished run's model as one file for llama.cpp."
    )
    parser.add_argument("run", metavar="RUN", help="name of the run, or a path to its folder")
    run = Run.named(check_parameters({"run": parser.parse_args().run})["run"], make=False)
    folder, made = run.folder, run.record("adapter")
    about = {"model": made["model"], "model_revision": made["model_revision"]}
    export(folder, SimpleNamespace(**about, merged=True, gguf=True, push_to=""))
    print(f"{folder / folder.name}.gguf is written, and a Modelfile for Ollama beside it.")


if __name__ == "__main__":
    run_command(main)
