"""The base model and its tokenizer: from a folder or from the Hub, and the device they run on."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import AlpacaError, locate


def best_device() -> str:
    """Return `cuda` where torch sees a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `model`, padding with its end-of-text token as the document does."""
    tokenizer = AutoTokenizer.from_pretrained(_known(model), revision=revision)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(model: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the base model on the best device, in evaluation mode; safetensors only, no code of the model's.

    Args:
        model: a folder, or a name on the Hub.
        revision: the commit on the Hub; None is the newest.
    """
    loaded = AutoModelForCausalLM.from_pretrained(_known(model), revision=revision, dtype=dtype, use_safetensors=True)
    return loaded.eval().to(best_device())


def _known(model: str) -> str:
    """Return `model` as the loaders want it; a folder that is not there is never looked up on the Hub."""
    path = locate(model)
    if path.is_dir():
        return str(path.resolve())
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise AlpacaError(f"There is no model folder {model}: check the parameter `model`.")
    return model
