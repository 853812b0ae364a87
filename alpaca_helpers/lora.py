"""LoRA: its configuration, and adapters saved and loaded so that a wrong one is noticed."""

import hashlib
import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file

from . import AlpacaError, portable
from .hub import first_line
from .runs import atomic_folder, check_disk_space, verify_checksums, write_checksums, write_json

# peft asks transformers by an older name for something that adapters here do not use
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
TOKENIZER_BYTES = 5_000_000  # room that a tokenizer takes on disk; GPT-2's is 3.6 MB
BASE = "base.json"  # beside an adapter: which weights it was trained on
REMEDY = "load the base it was trained on, or run notebook 03 again"


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
    with check_disk_space(folder, needed=weights + TOKENIZER_BYTES), atomic_folder(folder) as part:
        model.save_pretrained(part, save_embedding_layers=False)  # "auto" may ask the Hub for the base's config
        tokenizer.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # peft's, with this machine's paths
        write_json(part / BASE, {"sha256": base_hash(model)})
        write_checksums(part)


def base_hash(model) -> str:
    """Return the SHA-256 of the base's weights, each rounded to bfloat16; an adapter on them changes nothing.

    So a base held in float32 and the same held in bfloat16 are one base.
    """
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        if "lora_" not in name:
            digest.update(name.removeprefix("base_model.model.").replace(".base_layer.", ".").encode())
            digest.update(value.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy())
    return digest.hexdigest()


def load_adapter(base, folder: Path) -> PeftModel:
    """Return `base` with the adapter in `folder` attached, in evaluation mode.

    Raises AlpacaError, with `base` left as it was, if the adapter is missing, changed since it was saved, without
    effect, or made for another base: peft itself would load what fits in silence and answer like the base.
    """
    folder = Path(folder).resolve()
    if (folder / PICKLE).exists() and not (folder / WEIGHTS).exists():
        raise AlpacaError(
            f"The adapter in {folder} is a pickle ({PICKLE}), which could run any code: it is not loaded; save it as "
            f"{WEIGHTS}, or run notebook 03."
        )
    if missing := verify_checksums(folder):
        raise AlpacaError(f"The adapter in {folder} is missing or not whole ({missing}): run notebook 03 again.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        saved = load_file(folder / WEIGHTS)
        made_on = json.loads((folder / BASE).read_text(encoding="utf-8"))["sha256"]
        wanted = _shapes(base, config)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise AlpacaError(
            f"The adapter in {folder} cannot be put on this base model ({first_line(error)}): run notebook 03 again."
        ) from error
    if odd := sorted({(name, tuple(value.shape)) for name, value in saved.items()} ^ wanted.items()):
        raise AlpacaError(f"{_misfit(folder, config)}: {odd[0][0]} differs; {REMEDY}.")
    if made_on != base_hash(base):
        raise AlpacaError(f"{_misfit(folder, config)}: the base's weights are others; {REMEDY}.")
    if broken := sorted(name for name, value in saved.items() if not value.isfinite().all()):
        raise AlpacaError(
            f"The adapter in {folder} holds numbers that are none (NaN or infinite, in {broken[0]}): train it again "
            "with a smaller `learning_rate`."
        )
    if not any(value.any() and saved[name.replace("_A", "_B")].any() for name, value in saved.items() if "_A" in name):
        raise AlpacaError(f"The adapter in {folder} is zero, it would answer as the base does: run notebook 03 again.")
    return PeftModel.from_pretrained(base, str(folder)).eval()


def _shapes(base, config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """Return the adapter's weights by name, as `config` asks for them on `base`, from a copy without memory."""
    with torch.device("meta"):
        twin = type(base)(base.config)
        twin.name_or_path = config.base_model_name_or_path  # peft would write the base's into `config`
        model = get_peft_model(twin, config)
    named = ((name.replace(".default.", "."), value) for name, value in model.named_parameters())
    return {name: tuple(value.shape) for name, value in named if "lora_" in name}


def _misfit(folder: Path, config: PeftConfig) -> str:
    return f"The adapter in {folder}, made for {config.base_model_name_or_path}, does not fit this base model"
