"""What leaves the project is ordinary: other programs, and transformers 4 as well as 5, load it and answer the same."""

import json
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from .files import write_json
from .generation import end_tokens
from .models import positions
from .prompts import add_template


def finish_tokenizer(folder: Path) -> None:
    """Give the tokenizer saved in `folder` the prompt as its chat template, and padding on the left, as batches need.

    It becomes one that transformers 4 loads too; the tokenizer in memory stays as it is.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    add_template(tokenizer)
    tokenizer.save_pretrained(folder)
    name_for_older(folder)


def name_for_older(folder: Path) -> None:
    """Write the configuration of the tokenizer in `folder` in the words of transformers 4, which 5 reads as well.

    Its class is the one that takes all from tokenizer.json: others build some of it anew, by rules of their version.
    """
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):  # how this one was loaded
        config.pop(name, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]  # in 4 also segments, which GPT-2 would add up
    if "extra_special_tokens" in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", config)


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
