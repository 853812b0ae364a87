"""Answers from a model: a batch at once or token by token, base or tuned, with one decoding loop for all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from . import AlpacaError
from .models import positions
from .prompts import encode

_FORWARD = Lock()  # while a forward switches adapters off, no other thread may use the model
_SMALL = 4_000_000  # parameters times rows: below this, one thread is faster than several
DEFAULTS = {"max_new_tokens": 80, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt, in the end or so far."""

    text: str
    ids: list[int]  # the tokens written, without the end-of-text token
    stopped: bool  # it wrote an end-of-text token; else it was cut, or goes on
    prompt_cut: int  # tokens dropped from the front of a prompt too long for the model's positions

    @property
    def tokens(self) -> int:
        """How many tokens were written, without the end-of-text token."""
        return len(self.ids)


def generate(
    model, tokenizer, prompts: Sequence[str], *, side: str = "tuned", batch_size: int = 64, **settings
) -> list[Answer]:
    """Return one answer a prompt, in order; prompts come from `prompts.format_prompt`.

    `tuned` is the model as it is, `base` the model with its adapter switched off. `batch_size` prompts are decoded
    together, which changes the speed, not the answers. `settings` are those of `stream`, and so are the errors.
    """
    if isinstance(prompts, str):  # a list of letters, to Python
        raise AlpacaError("The prompts are one text: pass a list of texts.")
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # like lengths pad little
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        asked, sides = [prompts[index] for index in chosen], [side] * len(chosen)
        (final,) = stream(model, tokenizer, asked, sides=sides, each_step=False, **settings)
        answers.update(zip(chosen, final))
    return [answers[index] for index in range(len(prompts))]


def stream(
    model,
    tokenizer,
    prompts: Sequence[str],
    sides: Sequence[str],
    stop: Event | None = None,
    each_step=True,
    **settings,
) -> Iterator[list[Answer]]:
    """Yield the answers so far, one a prompt, after `each_step`; the last yield is the final one.

    Args:
        sides: `base` or `tuned`, one a prompt; all are decoded in one batch.
        stop: set it to end the answers where they are.
        settings: where they differ from `DEFAULTS`. `temperature` 0 is greedy decoding; `top_k` 0 and `top_p` 1 draw
            from all tokens; the same prompt, settings and `seed` give the same answer, in any batch.

    Raises AlpacaError for a setting out of range.
    """
    settings = check_settings(model, settings)
    if unknown := set(sides) - {"base", "tuned"}:
        raise AlpacaError(f"There is no side {sorted(unknown)[0]!r} of a model: choose base or tuned.")
    if "base" in sides and any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer)):
        raise AlpacaError("The adapter is merged into the base: call `model.unmerge_adapter()` first.")
    ids, room = encode(list(prompts), tokenizer), positions(model.config) - settings["max_new_tokens"]
    written: list[list[int]] = [[] for _ in ids]
    stopped = [False] * len(ids)

    def answers(final: bool) -> list[Answer]:
        texts = tokenizer.batch_decode(written)
        if not final:  # a character may span two tokens: show it when it is whole
            texts = [text.rstrip("\ufffd") for text in texts]
        cuts = [max(0, len(prompt) - room) for prompt in ids]
        return [Answer(text.strip(), [*said], end, cut) for text, said, end, cut in zip(texts, written, stopped, cuts)]

    eos, ends, device = tokenizer.eos_token_id, end_tokens(model, tokenizer), model.device
    batch = padded_left([prompt[-room:] or [eos] for prompt in ids], eos, device)
    random = torch.Generator().manual_seed(settings["seed"])  # on the CPU: the same draws on every device
    adapters, one_thread = adapter_scalings(model), model.num_parameters() * len(ids) < _SMALL
    cache, left = DynamicCache(config=model.config), list(range(len(ids)))
    for _ in range(settings["max_new_tokens"]):
        if stop is not None and stop.is_set():
            break
        with only_forward(model, adapters, [sides[row] for row in left], one_thread):
            output = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        if logits.isnan().any():
            raise AlpacaError("The model's output is not a number: load it in float32, or train its adapter again.")
        draw = torch.rand(1, 1, generator=random)  # one for all rows: an answer does not depend on its batch
        for row, token in zip(left, _next_tokens(logits, draw, settings)):
            stopped[row] = token in ends
            if not stopped[row]:
                written[row].append(token)
        if each_step:
            yield answers(final=False)
        going = [place for place, row in enumerate(left) if not stopped[row]]
        if not going:
            break
        if len(going) < len(left):  # finished answers leave the batch
            chosen = torch.tensor(going, device=device)
            cache.batch_select_indices(chosen)
            left, batch = [left[place] for place in going], {name: value[chosen] for name, value in batch.items()}
        batch["input_ids"] = torch.tensor([written[row][-1:] for row in left], device=device)
        batch["attention_mask"] = F.pad(batch["attention_mask"], (0, 1), value=1)
        batch["position_ids"] = batch["position_ids"][:, -1:] + 1
    yield answers(final=True)


def check_settings(model, settings: dict) -> dict:
    """Return the settings of `stream` with its defaults; AlpacaError for one unknown, or out of the model's range."""
    ranges = {
        "max_new_tokens": (1, positions(model.config) - 1),
        "temperature": (0.0, 1e30),
        "top_k": (0, 2**63 - 1),
        "top_p": (0.0, 1.0),
        "seed": (0, 2**63 - 1),
    }
    for name, value in settings.items():
        if name not in ranges:
            raise AlpacaError(f"There is no setting {name!r}: choose among {', '.join(ranges)}.")
        low, high = ranges[name]
        if type(value) not in (int, type(low)) or not low <= value <= high:
            kind = "a whole number" if isinstance(low, int) else "a number"
            raise AlpacaError(f"{name} is {value!r}: choose {kind} from {low} to {high}.")
    return DEFAULTS | settings


def end_tokens(model, tokenizer) -> list[int]:
    """Return the ids that end an answer, to pass as `eos_token_id`: the tokenizer's end of text and the model's."""
    own = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(id for id in ids if id < len(tokenizer))  # a default of GPT-2's may lie beyond a small vocabulary


def padded_left(rows: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and `position_ids` of rows of ids, each (rows, longest row)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def adapter_scalings(model) -> list[dict[str, float]]:
    """Return what each layer's adapters are scaled by; nothing for a model without adapter."""
    return [layer.scaling for layer in model.modules() if isinstance(layer, LoraLayer)]


@contextmanager
def only_forward(model, adapters: Sequence[dict], sides: Sequence[str], one_thread: bool = False) -> Iterator[None]:
    """Run a forward of `model` in the block on rows of these `sides`, in evaluation mode, while no other thread does.

    In the base's rows the adapter is scaled by zero: `adapters` are the model's `adapter_scalings`, computed once and
    not per token. However the block ends, by Ctrl-C too, the model is left as it was.
    """
    with _FORWARD, torch.inference_mode():
        training, scalings, threads = model.training, [{**scaling} for scaling in adapters], torch.get_num_threads()
        try:
            if training:
                model.eval()
            if one_thread:
                torch.set_num_threads(1)
            if "base" in sides:
                tuned = torch.tensor([float(side == "tuned") for side in sides], device=model.device).view(-1, 1, 1)
                for scaling in adapters:
                    scaling.update({name: scale * tuned for name, scale in scaling.items()})
            yield
        finally:
            for scaling, before in zip(adapters, scalings):
                scaling.update(before)
            torch.set_num_threads(threads)
            if training:
                model.train()


def _next_tokens(logits: torch.Tensor, draws: torch.Tensor, settings: Mapping) -> list[int]:
    """Return each row's next token id, from logits, (rows, vocabulary), and a draw from [0, 1), (rows or 1, 1)."""
    if settings["temperature"] < 1e-6:  # 0, or so little that the likeliest token is certain
        return logits.argmax(-1).tolist()
    warpers = [TemperatureLogitsWarper(float(settings["temperature"])), TopPLogitsWarper(float(settings["top_p"]))]
    if settings["top_k"]:
        warpers.insert(1, TopKLogitsWarper(settings["top_k"]))
    probabilities = LogitsProcessorList(warpers)(None, logits).softmax(-1)
    up_to = probabilities.cpu().double().cumsum(-1)  # on the CPU: Apple's MPS has no float64
    return torch.searchsorted(up_to, (1 - draws) * up_to[:, -1:])[:, 0].tolist()  # 1 - draws is above 0
