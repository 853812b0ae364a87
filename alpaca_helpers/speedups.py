"""What makes a training step faster than transformers' and peft's own settings do, with the same loss and gradients.

`python -m benchmarks.speedups` times a step with all of it against one without each part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from transformers import AutoConfig

from .models import FOLDER_ONLY, base_dtype, best_device


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


@contextmanager
def lora_in_base_precision(model) -> Iterator[None]:
    """Compute LoRA's products in the block in the precision of what they are added to, the second as it is added.

    Without it a step of 256 rows of GPT-2 medium on an H200 takes 1.25 times as long, one of 16 rows on a CPU 1.07.
    """
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    for layer in layers:
        layer.forward = partial(_lora_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _lora_forward(layer: lora.Linear, x: torch.Tensor, **kwargs) -> torch.Tensor:
    if not layer.training or layer.disable_adapters or layer.merged or layer.lora_variant or kwargs:
        return type(layer).forward(layer, x, **kwargs)
    result = layer.base_layer(x)
    for name in filter(layer.lora_A.__contains__, layer.active_adapters):
        a, b = layer.lora_A[name].weight.to(x.dtype), layer.lora_B[name].weight * layer.scaling[name]
        reduced = F.linear(layer.lora_dropout[name](x), a)
        result = torch.addmm(result.flatten(0, -2), reduced.flatten(0, -2), b.to(x.dtype).t()).view(result.shape)
    return result
