"""A tiny random model of each architecture with a tokenizer of its kind, made on the spot."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GemmaConfig,
    GemmaTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2Tokenizer,
    GPTNeoXConfig,
    GPTNeoXTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.pytorch_utils import Conv1D

from alpaca_helpers import pocket
from alpaca_helpers.lora import lora_config
from alpaca_helpers.prompts import format_example

BYTES = [f"<0x{number:02X}>" for number in range(256)]


@lru_cache
def bpe(kind: str, *special: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges learned on the pocket's rows: over bytes, or over letters with ▁ for a space."""
    made = Tokenizer(models.BPE())
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet, first = pre_tokenizers.ByteLevel.alphabet(), list(special)
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        alphabet, first = [], [*special, *BYTES]
    rows = [json.loads(line) for line in pocket.TRAIN.read_text(encoding="utf-8").splitlines()[:300]]
    texts = [format_example(row["instruction"], row["output"], row["input"]) for row in rows]
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + 500, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    model = json.loads(made.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def gpt2_tokenizer():
    """Byte-level, without a BOS or padding token."""
    vocab, merges = bpe("bytes", "<|endoftext|>")
    return GPT2Tokenizer(vocab=vocab, merges=merges)


def llama_tokenizer():
    """▁ for a space, one put before a text, and BOS before that; no padding token."""
    vocab, merges = bpe("letters", "<unk>", "<s>", "</s>")
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def qwen_tokenizer():
    """Byte-level, without BOS, with a padding token of its own and a second end token."""
    vocab, merges = bpe("bytes", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return Qwen2Tokenizer(vocab=vocab, merges=merges, **special, extra_special_tokens=["<|im_start|>"])


def neox_tokenizer():
    """Byte-level, without BOS, with a padding token of its own."""
    vocab, merges = bpe("bytes", "<|endoftext|>", "<|padding|>")
    return GPTNeoXTokenizer(vocab=vocab, merges=merges)


def opt_tokenizer():
    """Byte-level, with a BOS that is the end-of-text token too, and a padding token of its own."""
    vocab, merges = bpe("bytes", "<s>", "<pad>", "</s>")
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, add_bos_token=True, **special)


def gemma_tokenizer():
    """▁ for a space, none put before a text, BOS, and a padding token of its own."""
    vocab, merges = bpe("letters", "<pad>", "<eos>", "<bos>", "<unk>")
    return GemmaTokenizer(vocab=vocab, merges=merges, mask_token=None, add_bos_token=True)


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = SHAPE | {"num_key_value_heads": 1, "head_dim": 16}
MODELS: dict[str, tuple[Callable, Callable, dict]] = {  # configuration, tokenizer, what is special
    "gpt2": (GPT2Config, gpt2_tokenizer, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    "llama": (LlamaConfig, llama_tokenizer, GROUPED | {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, qwen_tokenizer, SHAPE | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, qwen_tokenizer, GROUPED | {"tie_word_embeddings": False}),
    "gpt_neox": (GPTNeoXConfig, neox_tokenizer, SHAPE | {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
    "opt": (OPTConfig, opt_tokenizer, SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gemma": (GemmaConfig, gemma_tokenizer, GROUPED),
}
PLACELESS = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.1}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
OTHERS = {
    "bloom": (BloomConfig, neox_tokenizer, PLACELESS),  # without positions, so without a limit
    # look back a few tokens only in some of their layers
    "gemma2": (Gemma2Config, gemma_tokenizer, GROUPED | SLIDING),
    "gemma3": (Gemma3TextConfig, gemma_tokenizer, GROUPED | SLIDING),
}


def tiny(kind: str, **changes):
    """Return a random model, with weights large enough for its answers to differ, and its tokenizer."""
    make_config, make_tokenizer, shape = (MODELS | OTHERS)[kind]
    tokenizer = make_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    more = {"vocab_size": len(tokenizer), "initializer_range": 0.2} | ids
    limit = {} if kind in ("gpt2", "bloom") else {"max_position_embeddings": 256}
    config = make_config(**shape | more | limit | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if kind in ("qwen2", "qwen3"):  # as the published ones have it
        model.generation_config = GenerationConfig(
            eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], do_sample=True, repetition_penalty=1.5
        )
    return model, tokenizer


def save(kind: str, folder: Path, **options) -> Path:
    """Write the tiny model and its tokenizer into `folder`; options of `save_pretrained`."""
    model, tokenizer = tiny(kind)
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("It is.").input_ids == tokenizer("It is.").input_ids
    return folder


def with_lora(base, std: float = 0.5, **settings) -> PeftModel:
    """Return the base under a random adapter that changes its answers; `lora_config`'s settings."""
    transposed = any(isinstance(layer, Conv1D) for layer in base.modules())
    model = get_peft_model(base, lora_config(**{"fan_in_fan_out": transposed} | settings))
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=std)
    return model.eval()


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of the loss by the parameters' names."""
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Check that tensors of the same names hold the same numbers, computed in another order.

    float32 rounds by up to 2^-24. What is compared here are sums of up to 2^16 products (rows, tokens, width), whose
    roundings add up like a random walk: to 2^8 of them, so to 2^-16 of the largest number of the tensor.
    """
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.dtype == torch.float32 == got[name].dtype, name
        torch.testing.assert_close(got[name], value, atol=2**-16 * value.abs().max().item(), rtol=0, msg=name)
