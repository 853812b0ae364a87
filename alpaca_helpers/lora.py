"""LoRA: its configuration, and adapters saved and loaded so that a wrong one is noticed."""

import json
import warnings
from pathlib import Path

from peft import LoraConfig, PeftModel, TaskType
from safetensors import SafetensorError, safe_open

from . import AlpacaError, portable
from .runs import room_on_disk, whole_folder

# peft asks transformers by an older name for something that adapters here do not use
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENIZER_BYTES = 5_000_000  # room that a tokenizer takes on disk; GPT-2's is 3.6 MB


def lora_config(
    rank: int = 8, alpha: int = 16, dropout: float = 0.1, target_modules: tuple[str, ...] = ("c_attn",)
) -> LoraConfig:
    """Return the document's LoRA configuration: low-rank updates of GPT-2's attention projections."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        fan_in_fan_out=True,  # GPT-2's Conv1D keeps its weight as (inputs, outputs)
    )


def save_adapter(model: PeftModel, tokenizer, folder: Path) -> None:
    """Write adapter and tokenizer to `folder`: all of it, or nothing and the earlier one stays."""
    weights = 4 * sum(value.numel() for value in model.parameters() if value.requires_grad)
    config = model.active_peft_config
    config.base_model_name_or_path = portable(config.base_model_name_or_path or "")
    with room_on_disk(folder, needed=weights + TOKENIZER_BYTES), whole_folder(folder) as part:
        model.save_pretrained(part, save_embedding_layers=False)  # "auto" may ask the Hub for the base's config
        tokenizer.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # peft's, with this machine's paths


def load_adapter(base, folder: Path) -> PeftModel:
    """Return `base` with the adapter in `folder` attached, in evaluation mode.

    Raises AlpacaError if the folder is missing or not whole, or if the adapter was made for another model: peft
    itself would load what fits in silence and answer like the base.
    """
    folder = Path(folder).resolve()
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise AlpacaError(f"The adapter in {folder} is missing or not whole ({error}): run notebook 03.") from error
    model = PeftModel.from_pretrained(base, str(folder))
    wanted = {
        name.replace(".default.", "."): tuple(value.shape)
        for name, value in model.named_parameters()
        if "lora_" in name
    }
    if saved != wanted:
        odd = sorted(saved.items() ^ wanted.items())[0][0]
        raise AlpacaError(
            f"The adapter in {folder} (made for {config.get('base_model_name_or_path')}) does not fit this base model: "
            f"{odd} differs; load the base it was trained on, or run notebook 03 again."
        )
    return model.eval()
