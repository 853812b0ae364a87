"""LoRA: its configuration, and adapters saved and loaded so that a wrong one is noticed."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TARGETS
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from . import AlpacaError, locate
from .files import WEIGHTS, atomic_folder, verify_checksums, write_json
from .hub import first_line
from .prompts import add_template

CONFIG = "adapter_config.json"
TOKENIZER_BYTES = 5_000_000  # room that a tokenizer takes on disk; GPT-2's is 3.6 MB
BASE = "base.json"  # beside an adapter: which weights it was trained on
LINEAR = (torch.nn.Linear, Conv1D)
LORA = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")  # what is trained
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of `init_lora_weights`


def lora_config(
    r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.1,
    target_modules: list[str] | str | None = None,
    fan_in_fan_out: bool = True,
) -> LoraConfig:
    """Return the document's LoRA configuration: low-rank updates of the attention's projections.

    `target_modules` None are those that peft knows for the architecture, GPT-2's being `c_attn`. `fan_in_fan_out`: the
    base keeps its weights as (inputs, outputs), as GPT-2's `Conv1D` does; False for torch's `Linear`.
    """
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        fan_in_fan_out=fan_in_fan_out,
    )


@contextmanager
def adapter_folder(folder: Path, model: PeftModel, base_name: str, revision: str | None = None) -> Iterator[Path]:
    """Yield a folder to save adapter and tokenizer to, which replaces `folder` once all of it is written.

    When the block ends, the saved tokenizer is finished (`finish_tokenizer`), the adapter gets its base's name and
    `revision`, and the folder the hash of the base's weights and the checksums of its files. A base that is a folder
    is named by its absolute path, so that peft finds it from anywhere. Raises AlpacaError if the disk is full, or if
    the new adapter has no effect or holds NaN; the earlier adapter then stays.
    """
    weights = 4 * sum(value.numel() for value in model.parameters() if value.requires_grad)
    with atomic_folder(folder, needed=weights + TOKENIZER_BYTES) as part:
        yield part
        if lacks := [name for name in (WEIGHTS, "tokenizer_config.json") if not (part / name).is_file()]:
            remedy = "`save_pretrained` of both the model and the tokenizer is to write into the folder given"
            raise AlpacaError(f"The new adapter is not saved to {folder}, without {lacks[0]}: {remedy}.")
        check_numbers(load_file(part / WEIGHTS), f"The new adapter, which is not saved to {folder},")
        finish_tokenizer(part)
        (part / "README.md").unlink(missing_ok=True)  # peft's, with this machine's paths
        place = locate(base_name)
        name_base(part, str(place.resolve()) if place.is_dir() else base_name, revision)
        write_json(part / BASE, {"sha256": base_hash(model)})


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
    if not (folder / "tokenizer.json").is_file():
        return  # one of another kind
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):  # how this one was loaded
        config.pop(name, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]  # 4 adds token_type_ids, which GPT-2 would embed
    if "extra_special_tokens" in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", config)


def name_base(folder: Path, base_name: str, revision: str | None = None) -> None:
    """Write into the configuration of the adapter in `folder` which base model it belongs on."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, config | {"base_model_name_or_path": base_name, "revision": revision})


def choose_targets(base, target_modules: Sequence[str] | str | None) -> Sequence[str] | str | None:
    """Return which layers of `base` LoRA is to correct: `target_modules`, as a list of names or `all-linear`.

    None stands for those that peft knows for the architecture, or else for all linear layers. Of a mixture of experts
    only the attention is corrected: peft cannot combine dropout with the experts' weights. A line says so in both
    cases. Raises AlpacaError unless each name is that of linear layers inside the blocks. The output layer is refused:
    in GPT-2 its matrix is the embedding's too, and would be changed in one place only.
    """
    kind, head = base.config.model_type, base.get_output_embeddings()
    experts = any("expert" in name and value.dim() > 2 for name, value in base.named_parameters())
    layers = [name for name, layer in base.named_modules() if isinstance(layer, LINEAR) and layer is not head]
    layers = [name for name in layers if "att" in name] if experts else layers
    names = sorted({name.rpartition(".")[2] for name in layers})
    if target_modules in (None, "all-linear", ["all-linear"]):
        if experts:
            print(f"Note: {kind} is a mixture of experts: only its attention is corrected: {', '.join(names)}.")
            return names
        if target_modules is None and kind in KNOWN_TARGETS:
            return None
        if target_modules is None:
            print(f"Note: peft names no layers for {kind}, so all linear ones are corrected: all-linear.")
        return "all-linear"
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            what = f"LoRA cannot correct `{target}` in {base.name_or_path}: choose `target_modules` among"
            raise AlpacaError(f"{what} {', '.join(names)}, or all-linear.")
    return targets


def check_trained(model: PeftModel, what: str = "This training") -> None:
    """Raise AlpacaError unless LoRA's two matrices are all that changes: what else does, a loaded adapter lacks."""
    start = str(getattr(getattr(model, "active_peft_config", None), "init_lora_weights", ""))  # another kind has none
    others = [name for name, value in model.named_parameters() if value.requires_grad and not LORA.search(name)]
    if start.lower().startswith(CHANGES_BASE) or others:
        more = others[0] if others else f"the base, by init_lora_weights={start}"
        remedy = "keep the defaults of `init_lora_weights`, `bias`, `modules_to_save`, `lora_bias`, `use_dora`"
        what = f"{what} changes more than LoRA's matrices A and B ({more})"
        raise AlpacaError(f"{what}: {remedy} and the like.")


def base_hash(model) -> str:
    """Return the SHA-256 of the base's weights, with or without an adapter, each rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        if "lora_" not in name:
            digest.update(name.removeprefix("base_model.model.").replace(".base_layer.", ".").encode())
            digest.update(value.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy())
    return digest.hexdigest()


def load_adapter(base, folder: Path) -> PeftModel:
    """Return `base` with the adapter in `folder` attached, in evaluation mode; errors as in `check_adapter`."""
    if isinstance(base, PeftModel):
        raise AlpacaError("The model has an adapter already: load this one onto a plain base, as `load_base` gives.")
    check_adapter(base, folder)
    return PeftModel.from_pretrained(base, str(Path(folder).resolve())).eval()


def check_adapter(base, folder: Path) -> None:
    """Raise AlpacaError if the adapter in `folder` does not belong on `base`, which is left as it is.

    It may be missing, changed since it was saved, without effect, or made for another base. peft itself would silently
    load what fits, and the model would answer as the base does.
    """
    folder = Path(folder).resolve()
    what = f"The adapter in {folder}"
    if wrong := verify_checksums(folder):
        raise AlpacaError(f"{what} is missing or not whole ({wrong}): run notebook 03 again.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        saved = load_file(folder / WEIGHTS)
        trained_on = json.loads((folder / BASE).read_text(encoding="utf-8"))["sha256"]
        wanted = _empty_adapter(base, config, what)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        wrong = f"cannot be put on this base model ({first_line(error)})"
        raise AlpacaError(f"{what} {wrong}: run notebook 03 again.") from error
    there, needed = ({(name, value.shape) for name, value in weights.items()} for weights in (saved, wanted))
    odd = sorted(there ^ needed)
    if odd or trained_on != base_hash(base):  # float16, then bfloat16 rounds otherwise than bfloat16 alone
        reason = f"{odd[0][0]} differs" if odd else "the base's weights are others, or held in float16"
        remedy = "load the base it was trained on, in float32, or run notebook 03 again"
        made_for = f"made for {config.base_model_name_or_path}, does not fit this base model"
        raise AlpacaError(f"{what}, {made_for}: {reason}; {remedy}.")
    check_numbers(saved, what)


def check_numbers(saved: dict[str, torch.Tensor], what: str) -> None:
    """Raise AlpacaError if an adapter's weights hold NaN or infinity, or have no effect; `what` names the adapter."""
    remedy = "train it again, with another `learning_rate` and `resume = False`"
    if broken := sorted(name for name, value in saved.items() if not value.isfinite().all()):
        raise AlpacaError(f"{what} holds NaN or infinity (in {broken[0]}): {remedy}.")
    pairs = [(value, saved[name.replace("lora_A", "lora_B")]) for name, value in saved.items() if "lora_A" in name]
    if not any(a.any() and b.any() for a, b in pairs):
        raise AlpacaError(f"{what} is zero, it would answer as the base does: {remedy}.")


def _empty_adapter(base, config: PeftConfig, what: str) -> dict[str, torch.Tensor]:
    """Return the weights, without their memory, that an adapter with this configuration saves on `base`."""
    config.inference_mode = False  # so that what was trained can be told from the base
    with torch.device("meta"):
        twin = type(base)(base.config)
        twin.name_or_path = config.base_model_name_or_path  # peft would write the base's into `config`
        model = get_peft_model(twin, config)
    check_trained(model, what)
    return get_peft_model_state_dict(model, save_embedding_layers=False)


@contextmanager
def lora_in_base_precision(model) -> Iterator[None]:
    """Compute LoRA's two products in the base's precision in the block, the second together with the addition.

    Without it a step of 256 rows of GPT-2 medium on an H200 takes 1.25 times as long, one of 16 rows on a CPU 1.07.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.forward = partial(_lora_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _lora_forward(layer: Linear, x: torch.Tensor, **kwargs) -> torch.Tensor:
    if not layer.training or layer.disable_adapters or layer.merged or layer.lora_variant or kwargs:
        return type(layer).forward(layer, x, **kwargs)
    result = layer.base_layer(x)
    for name in filter(layer.lora_A.__contains__, layer.active_adapters):
        a, b = layer.lora_A[name].weight.to(x.dtype), layer.lora_B[name].weight * layer.scaling[name]
        reduced = F.linear(layer.lora_dropout[name](x), a)
        result = torch.addmm(result.flatten(0, -2), reduced.flatten(0, -2), b.to(x.dtype).t()).view(result.shape)
    return result
