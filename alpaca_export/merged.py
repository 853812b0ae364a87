"""A run's model for other programs: the adapter merged into the base, in a folder that needs no peft."""

import json
from pathlib import Path

from transformers import GenerationConfig

from alpaca_helpers.files import atomic_folder, write_json
from alpaca_helpers.generation import end_tokens
from alpaca_helpers.lora import TOKENIZER_BYTES, finish_tokenizer, load_adapter
from alpaca_helpers.models import positions


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
