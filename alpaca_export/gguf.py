"""A model and its tokenizer in one file of GGUF, llama.cpp's format.

llama.cpp's own package gguf, an extra, has the format and its names for the weights. What it does not know of a model
is here: its shape, how two of its matrices are stored, and how its tokenizer cuts a text.
"""

import json
import re
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from alpaca_helpers import AlpacaError
from alpaca_helpers.models import positions
from alpaca_helpers.prompts import chat_template

ARCHITECTURES = {"gpt2": "GPT2", "llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
POSITIONS = ("default", "llama3")  # how rotary positions are computed
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's are (inputs, outputs)
ASSUMED = {  # by llama.cpp, of what a configuration may have otherwise
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "hidden_act": ("silu",),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_sliding_window": (False,),
}
BYTE = re.compile("<0x[0-9A-F]{2}>")
SPLITS = {  # how byte-level tokenizers other than GPT-2's cut a text before they merge, and llama.cpp's names for it
    PRETOKENIZE_REGEX: "qwen2",
    PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe",
}


def write_gguf(merged: Path, path: Path) -> None:
    """Write the model and the tokenizer in the folder `merged` into the file `path`, in float32.

    Raises AlpacaError for an architecture or a tokenizer that is not known here.
    """
    config = AutoConfig.from_pretrained(merged)
    if config.model_type not in ARCHITECTURES:
        raise _unknown(merged, f"its architecture, {config.model_type},")
    for name, values in ASSUMED.items():
        if (value := getattr(config, name, values[0])) not in values:
            raise _unknown(merged, f"its configuration, {name} {value},")
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_shape(writer, config, merged)
    _write_tokenizer(writer, config, merged)
    for file in sorted(merged.glob("*.safetensors")):
        for key, value in load_file(file).items():
            layer = key.split(".")[-2]
            if config.model_type == "gpt2" and key.endswith(TRANSPOSED):
                value = value.T
            elif writer.arch == "llama" and layer in heads:  # llama.cpp rotates neighbours, transformers two halves
                value = value.unflatten(0, (heads[layer], 2, -1)).transpose(1, 2).flatten(0, 2)
            if not (place := names.get_name(key, (".weight", ".bias"))):
                raise _unknown(merged, f"its weight {key}")
            writer.add_tensor(place, value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: gguf.GGUFWriter, config, merged: Path) -> None:
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(positions(config))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    rope, width = config.rope_parameters, getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] not in POSITIONS:
        raise _unknown(merged, f"its rotary positions, {rope['rope_type']},")
    if rope["rope_type"] == "llama3":
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
        plain = rope["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        writer.add_tensor("rope_freqs.weight", (plain / frequencies).numpy())


def _write_tokenizer(writer: gguf.GGUFWriter, config, merged: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    texts = {id: text for text, id in tokenizer.get_vocab().items()}
    special = {token["id"]: token["special"] for token in content["added_tokens"]}
    ids, merges = range(config.vocab_size), content["model"].get("merges", [])
    writer.add_token_list([texts.get(id, f"[unused {id}]") for id in ids])
    writer.add_token_types([_token_type(texts.get(id), special.get(id)) for id in ids])
    for name in ("bos", "eos", "pad", "unk"):
        if (id := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(id)
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    writer.add_add_bos_token(begins)
    if rule := _split_rule(content["pre_tokenizer"]):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule)
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_chat_template(tokenizer.chat_template)
    elif content["model"].get("byte_fallback"):  # as SentencePiece has it: what is merged first has the highest score
        scores = {"".join(merge): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([scores.get(texts.get(id, ""), -1e6) for id in ids])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
        writer.add_chat_template(chat_template(tokenizer.bos_token if begins else ""))  # without a space after BOS
    else:
        raise _unknown(merged, "its tokenizer")


def _split_rule(pre_tokenizer: dict | None) -> str | None:
    """Return llama.cpp's name for how a byte-level tokenizer cuts a text; None for an unknown or another kind."""
    match (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel", "add_prefix_space": False}]:
            return SPLITS.get(regex)
    return None


def _token_type(text: str | None, special: bool | None) -> gguf.TokenType:
    """Return what a token is to llama.cpp; `special` is None for one that was not added to the vocabulary."""
    if special is not None:
        return gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    if text is None:
        return gguf.TokenType.UNUSED
    return gguf.TokenType.BYTE if BYTE.fullmatch(text) else gguf.TokenType.NORMAL


def _unknown(merged: Path, what: str) -> AlpacaError:
    known = f"{', '.join(ARCHITECTURES)} with a BPE tokenizer"
    sentence = f"{merged} cannot be written as GGUF: {what} is not among those known here ({known})"
    return AlpacaError(f"{sentence}; try llama.cpp's convert_hf_to_gguf.py on that folder.")
