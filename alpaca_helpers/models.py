"""The base model and its tokenizer: a folder ready for `from_pretrained`, and the device they run on."""

import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import logging

from . import AlpacaError, locate
from .hub import cached_folder, fetch, first_line

TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens*", "added_tokens*", "chat_template*")
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
MODEL_FILES = ["config.json", "generation_config.json", "adapter_config.json", *TOKENIZER_FILES, *WEIGHT_FILES]
FOLDER_ONLY = {"local_files_only": True, "trust_remote_code": False}  # no download, no code of a model's own


def best_device() -> str:
    """Return `cuda` where torch sees a GPU, `mps` on Apple's, else `cpu`; Trainer chooses the same."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def base_dtype() -> torch.dtype:
    """Return the precision of the base in a training: bfloat16 where the device has units for it, else float32."""
    if torch.cuda.is_available():
        native = torch.cuda.get_device_capability() >= (8, 0)  # is_bf16_supported() counts emulation too
    else:
        units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, unit, bool)() for unit in units)
    return torch.bfloat16 if native else torch.float32


def positions(config) -> int:
    """Return how many tokens a model of this configuration can attend to; 2**31 - 1 where it has no limit."""
    config = config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # MPT's
    return next(filter(None, limits), 2**31 - 1)


def fetch_model(name: str, revision: str | None = None) -> Path:
    """Return the absolute folder of a base model, ready for `from_pretrained`; downloaded only if it is not here.

    `name` is a folder, or a name on the Hub; `revision` the commit there, None the one in the cache, else the newest.
    Raises AlpacaError if there is none, or if it is not a whole decoder-only model with its tokenizer, its weights in
    safetensors, of which the headers are read.
    """
    if (here := locate(name)).is_dir():
        return _checked(here.resolve())
    if here.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:  # a path: never looked up on the Hub
        raise AlpacaError(f"There is no model folder {name}: check the parameter `model_name`.")
    if folder := cached_folder(name, revision, "model", MODEL_FILES):
        try:
            return _checked(folder)
        except AlpacaError as error:
            if isinstance(error.__cause__, NotImplementedError):
                raise  # else a part of it may have come in another way: ask the Hub for the rest
    return _checked(fetch(name, revision, "model", MODEL_FILES))


def training_options(folder: Path) -> dict[str, Any]:
    """Return arguments of `from_pretrained` with which a training on the model in `folder` takes less time.

    Times without, of a step of GPT-2 124M on a CPU: dropout off in the base, which is not trained (LoRA's own stays
    on), 1.06 to 1.13; GPT-2's activation in one operation instead of seven, 1.07 to 1.19; on a CPU in bfloat16,
    attention step by step, as the gradient of torch's fused kernel takes three to five times as long up to 256 tokens.
    """
    config = AutoConfig.from_pretrained(folder, **FOLDER_ONLY).to_dict()
    options: dict[str, Any] = {
        name: 0.0 for name, value in config.items() if "drop" in name and isinstance(value, float)
    }
    options |= {name: "gelu_pytorch_tanh" for name, value in config.items() if value == "gelu_new"}
    if best_device() == "cpu" and base_dtype() == torch.bfloat16:
        options["attn_implementation"] = "eager"
    return options


def check_length(folder: Path, tokens: int) -> None:
    """Raise AlpacaError if so many tokens, prompt and answer together, are more than the model's context."""
    limit = positions(AutoConfig.from_pretrained(folder, **FOLDER_ONLY))
    if tokens > limit:
        what = f"The model in {folder} has a context of {limit} tokens, and {tokens} are asked for"
        raise AlpacaError(f"{what}: choose a smaller `max_length` or `max_new_tokens`, or another model.")


def empty_model(folder: Path) -> PreTrainedModel:
    """Return the model in the folder without its weights: its layers, their names and their shapes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **FOLDER_ONLY))
    model.name_or_path = str(folder)
    return model


def check_weights(model: PreTrainedModel) -> None:
    """Raise AlpacaError with the first parameter that holds NaN or infinity."""
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise AlpacaError(f"The model {model.name_or_path} holds NaN or infinity in {name}: take another copy.")


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return a base model's tokenizer, which pads with its end-of-text token if need be; errors as in `fetch_model`."""
    tokenizer = AutoTokenizer.from_pretrained(fetch_model(name, revision), **FOLDER_ONLY)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.name_or_path = name
    return tokenizer


def load_base(name: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the base model on the best device, in evaluation mode, held in `dtype` whatever it is stored in.

    Answers and scores take float32: the same on every machine. Errors as in `fetch_model` and `check_weights`.
    """
    model = AutoModelForCausalLM.from_pretrained(fetch_model(name, revision), dtype=dtype, **FOLDER_ONLY)
    # an adapter names as its base the model, not a folder of this machine
    model.name_or_path = model.config._name_or_path = name
    check_weights(model)
    return model.eval().to(best_device())


def _checked(folder: Path) -> Path:
    """Return `folder`; raise AlpacaError if `from_pretrained` would fail there, or make up what is missing."""
    part = "config"
    try:
        if (folder / "adapter_config.json").exists():  # from_pretrained would ask the Hub for its base
            raise NotImplementedError("it is an adapter: choose the base that its adapter_config.json names")
        config = AutoConfig.from_pretrained(folder, **FOLDER_ONLY)
        model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
        cached = model and "past_key_values" in inspect.signature(model.forward).parameters  # for the decoding
        if encoder or config.is_encoder_decoder or not cached:
            raise NotImplementedError(f"a {config.model_type} is not a decoder-only Transformer")
        part = "tokenizer"
        _check_tokenizer(folder, config.get_text_config().vocab_size)
        part = "weights"
        _check_headers(folder)
    except Exception as error:  # any: it depends on where a file is broken
        downloaded = folder.is_relative_to(Path(constants.HF_HUB_CACHE).resolve())
        remedy = f"delete {folder.parents[1]} and run again" if downloaded else "correct it"
        what = f"The {part} of the model in {folder} cannot be used ({first_line(error)}): {remedy}"
        raise AlpacaError(f"{what}, or choose another model.") from error
    return folder


def _check_tokenizer(folder: Path, room: int) -> None:
    """Raise ValueError unless the tokenizer is whole, knows the end of a text, and has at most `room` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **FOLDER_ONLY)
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # the loader makes an empty one in silence
        raise ValueError("tokenizer.json is missing")
    if tokenizer.eos_token_id is None:
        raise ValueError("it has no end-of-text token, eos_token")
    if tokenizer("a").input_ids[-1:] != tokenizer("a", add_special_tokens=False).input_ids[-1:]:
        raise ValueError("it puts a token after every text, so after a prompt too: set add_eos_token to false")
    if len(tokenizer) > room:
        raise ValueError(f"the model has room for {room} tokens, and its tokenizer has {len(tokenizer)}")


def _check_headers(folder: Path) -> None:
    """Raise ValueError if a weight is missing or has another shape; only the headers of the files are read."""
    settings = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with ExitStack() as after:  # without the loader's progress bar and its report
        after.callback(logging.set_verbosity, logging.get_verbosity())
        if logging.is_progress_bar_enabled():
            after.callback(logging.enable_progress_bar)
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        _, info = AutoModelForCausalLM.from_pretrained(folder, device_map="meta", **settings, **FOLDER_ONLY)
    if wrong := sorted(info["missing_keys"]) or sorted(name for name, *_ in info["mismatched_keys"]):
        raise ValueError(f"there is no {wrong[0]} of the shape that config.json says")
