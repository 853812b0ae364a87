"""The base model and its tokenizer: from a folder or from the Hub, and the device they run on."""

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import AlpacaError, locate
from .hub import cached_folder, fetch, first_line

TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*", "model.*.index.json")


def best_device() -> str:
    """Return `cuda` where torch sees a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def base_dtype() -> torch.dtype:
    """Return what to hold the frozen base in: bfloat16 where the device multiplies it in hardware, else float32."""
    if torch.cuda.is_available():
        native = torch.cuda.get_device_capability() >= (8, 0)  # is_bf16_supported() counts emulation too
    else:
        units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, unit, bool)() for unit in units)
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `model`, padding with its end-of-text token as the document does.

    Arguments and errors as in `load_base`.
    """
    tokenizer = _load(AutoTokenizer, model, revision, TOKENIZER_FILES)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(model: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the base model on the best device, in evaluation mode; safetensors only, no code of the model's.

    What the Hub's cache holds is loaded without a network; the rest is downloaded first.

    Args:
        model: a folder, or a name on the Hub.
        revision: the commit on the Hub; None is the one in the cache, else the newest.

    Raises AlpacaError if the model is neither here nor to be had.
    """
    settings = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    return _load(AutoModelForCausalLM, model, revision, MODEL_FILES, **settings).eval().to(best_device())


def _load(loader, model: str, revision: str | None, files: tuple[str, ...], **settings):
    """Return what `loader` makes of the folder that `model` is, of the cache's, or of the one just fetched."""
    if (here := locate(model)).is_dir():
        return _from_folder(loader, here.resolve(), **settings)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:  # a path: never looked up on the Hub
        raise AlpacaError(f"There is no model folder {model}: check the parameter `model`.")
    loaded = None
    if folder := cached_folder(model, revision, "model"):
        with suppress(AlpacaError):  # not whole
            loaded = _from_folder(loader, folder, **settings)
    # by folder, because a loader given a name asks the Hub for an adapter's configuration, cache or not
    loaded = loaded or _from_folder(loader, fetch(model, revision, "model", files), **settings)
    if hasattr(loaded, "config"):
        loaded.config._name_or_path = model
    loaded.name_or_path = model  # what an adapter names as its base is the model, not a folder of this machine
    return loaded


def _from_folder(loader, folder: Path, **settings):
    try:
        loaded = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AlpacaError(
            f"The model in {folder} cannot be loaded ({first_line(error)}): put it right, or delete it."
        ) from error
    if isinstance(loaded, tuple):  # a model, and what its loader would only warn of
        loaded, info = loaded
        strange = [name for name, value in loaded.named_parameters() if not value.isfinite().all()]
        if wrong := sorted(info["missing_keys"]) or strange:
            fault = "is missing" if wrong[0] in info["missing_keys"] else "holds NaN or infinite numbers"
            raise AlpacaError(f"The model in {folder} is broken ({wrong[0]} {fault}): put it right, or delete it.")
    if isinstance(loaded, PreTrainedTokenizerBase) and not loaded.get_vocab().keys() - set(loaded.all_special_tokens):
        # the loader makes an empty tokenizer where the vocabulary is missing, and says nothing
        raise AlpacaError(f"The model in {folder} has no tokenizer: copy its tokenizer.json there.")
    return loaded
