"""A tiny random model of each architecture with a tokenizer of its kind, made on the spot."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaTokenizer,
    GenerationConfig,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
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


def opt_tokenizer(vocab, merges, **special) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, add_bos_token=True, **special)


OPTS_END = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
QWENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>"]}
TOKENIZERS = {  # what makes it, over which alphabet, its special tokens, settings
    # without a BOS or padding token
    "gpt2": (GPT2Tokenizer, "bytes", "<|endoftext|>", {}),
    # ▁ put before a text too, and BOS before that; no padding token
    "llama": (LlamaTokenizer, "letters", "<unk> <s> </s>", {"add_bos_token": True}),
    # without BOS, with a padding token of its own and a second end token
    "qwen": (Qwen2Tokenizer, "bytes", "<|endoftext|> <|im_start|> <|im_end|>", QWENS),
    # without BOS, with a padding token of its own
    "neox": (GPTNeoXTokenizer, "bytes", "<|endoftext|> <|padding|>", {}),
    # with a BOS that is the end-of-text token too, and a padding token of its own
    "opt": (opt_tokenizer, "bytes", "<s> <pad> </s>", OPTS_END | {"pad_token": "<pad>"}),
    # no ▁ put before a text, BOS, and a padding token of its own
    "gemma": (GemmaTokenizer, "letters", "<pad> <eos> <bos> <unk>", {"mask_token": None, "add_bos_token": True}),
}


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    make, alphabet, special, settings = TOKENIZERS[kind]
    vocab, merges = bpe(alphabet, *special.split())
    return make(vocab=vocab, merges=merges, **settings)


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = SHAPE | {"num_key_value_heads": 1, "head_dim": 16}
MODELS = {  # tokenizer, what is special
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    "llama": ("llama", GROUPED | {"tie_word_embeddings": False}),
    "qwen2": ("qwen", SHAPE | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen", GROUPED | {"tie_word_embeddings": False}),
    "gpt_neox": ("neox", SHAPE | {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
    "opt": ("opt", SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gemma": ("gemma", GROUPED),
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
OTHERS = {
    # without positions, so without a limit
    "bloom": ("neox", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.1}),
    # look back a few tokens only in some of their layers
    "gemma2": ("gemma", GROUPED | SLIDING),
    "gemma3_text": ("gemma", GROUPED | SLIDING),
}


def tiny(kind: str, **changes):
    """Return a random model, with weights large enough for its answers to differ, and its tokenizer."""
    name, shape = (MODELS | OTHERS)[kind]
    tokenizer = tiny_tokenizer(name)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    more = {"vocab_size": len(tokenizer), "initializer_range": 0.2} | ids
    limit = {} if kind in ("gpt2", "bloom") else {"max_position_embeddings": 256}
    config = AutoConfig.for_model(kind, **shape | more | limit | changes)
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
