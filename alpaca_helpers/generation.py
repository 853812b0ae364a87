"""Answers from a model: a batch at once or token by token, base or tuned, with one decoding loop for all."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from . import AlpacaError
from .models import positions
from .prompts import encode, parse_answer

_FORWARD = threading.Lock()  # while a forward switches adapters off, no other thread may use the model
_SMALL = 4_000_000  # parameters times rows: to share less than this among threads takes longer than to do it


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
    """Return one answer a prompt, in order.

    Args:
        prompts: made by `prompts.format_prompt`.
        side: `tuned` uses the model as it is, `base` switches its adapter off.
        batch_size: prompts decoded together; it changes the speed, not the answers.
        settings: those of `stream`.

    Raises AlpacaError for a setting out of range.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # like lengths pad little
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        *_, rows = _decode(model, tokenizer, [prompts[i] for i in chosen], [side] * len(chosen), **settings)
        answers.update(zip(chosen, _answers(tokenizer, rows)))
    return [answers[index] for index in range(len(prompts))]


def end_tokens(model, tokenizer) -> list[int]:
    """Return the ids that end an answer, for any `eos_token_id`: the tokenizer's end of text, and the model's own."""
    named = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


def stream(
    model, tokenizer, prompts: Sequence[str], *, sides: Sequence[str], stop: threading.Event | None = None, **settings
) -> Iterator[list[Answer]]:
    """Yield the answers so far, one a prompt, after each step; the last yield is the final one.

    Args:
        sides: `base` or `tuned`, one a prompt; all are decoded in one batch.
        stop: set it to end the answers where they are.
        settings: `max_new_tokens` (80); `temperature` (0: greedy); `top_k` (0: all) and `top_p` (1: all), what a
            sample is drawn from; `seed` (the same prompt, settings and seed give the same answer, in any batch).

    Raises AlpacaError for a setting out of range.
    """
    for rows in _decode(model, tokenizer, prompts, sides, **settings):
        if stop is not None and stop.is_set():
            break
        yield _answers(tokenizer, rows, final=False)
    yield _answers(tokenizer, rows)


@dataclass
class _Row:
    """A prompt being answered."""

    side: str
    prompt_cut: int
    random: torch.Generator  # on the CPU, one a row: a draw depends neither on the batch nor on the device
    written: list[int] = field(default_factory=list)
    stopped: bool = False


def _decode(
    model, tokenizer, prompts, sides, *, max_new_tokens=80, seed=0, temperature=0.0, top_k=0, top_p=1.0
) -> Iterator[list[_Row]]:
    """Yield all rows after each step, in which every unfinished one gets a token."""
    eos, ends, device = tokenizer.eos_token_id, end_tokens(model, tokenizer), model.device
    check_settings(model, max_new_tokens, seed, temperature, top_k, top_p)
    if unknown := set(sides) - {"base", "tuned"}:
        raise AlpacaError(f"There is no side {sorted(unknown)[0]!r} of a model: choose base or tuned.", "bad-setting")
    ids, room = encode(list(prompts), tokenizer), positions(model.config) - max_new_tokens
    cuts = [max(0, len(row) - room) for row in ids]
    rows = [_Row(side, cut, torch.Generator().manual_seed(seed)) for side, cut in zip(sides, cuts, strict=True)]
    batch = padded_left([row[-room:] or [eos] for row in ids], eos, device)
    adapters, one_thread = adapter_scalings(model), model.num_parameters() * len(rows) < _SMALL
    cache, left = DynamicCache(config=model.config), rows
    for _ in range(max_new_tokens):
        with only_forward(model, adapters, [row.side for row in left], one_thread):
            output = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        if logits.isnan().any():
            raise AlpacaError("The model's output is not a number: load it in float32, or train its adapter again.")
        for row, token in zip(left, _next_tokens(logits, [row.random for row in left], temperature, top_k, top_p)):
            row.stopped = token in ends
            if not row.stopped:
                row.written.append(token)
        yield rows
        going = [index for index, row in enumerate(left) if not row.stopped]
        if not going:
            return
        if len(going) < len(left):  # finished rows leave the batch
            chosen = torch.tensor(going, device=device)
            cache.batch_select_indices(chosen)
            left, batch = [left[index] for index in going], {name: value[chosen] for name, value in batch.items()}
        batch["input_ids"] = torch.tensor([row.written[-1:] for row in left], device=device)
        batch["attention_mask"] = F.pad(batch["attention_mask"], (0, 1), value=1)
        batch["position_ids"] = batch["position_ids"][:, -1:] + 1


def padded_left(rows: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and `position_ids` of rows of ids, each (rows, longest row)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def check_settings(model, max_new_tokens, seed, temperature, top_k, top_p) -> None:
    """Raise AlpacaError for a setting of `stream` that is out of range for the model, or no number."""
    large, lengths = range(2**63), range(1, positions(model.config))
    whole = {"max_new_tokens": (max_new_tokens, lengths), "top_k": (top_k, large), "seed": (seed, large)}
    for name, (value, allowed) in whole.items():
        if type(value) is not int or value not in allowed:
            words = f"a whole number from {allowed[0]} to {allowed[-1]}"
            raise AlpacaError(f"{name} is {value}: choose {words}.", "bad-setting")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if type(value) not in (int, float):
            raise AlpacaError(f"{name} is {value!r}: choose a number.", "bad-setting")
    if not (temperature == 0 or 0.01 <= temperature < math.inf):  # logits over less would overflow
        raise AlpacaError(f"temperature is {temperature}: choose 0 (greedy), or 0.01 or more.", "bad-setting")
    if not 0 < top_p <= 1:
        raise AlpacaError(f"top_p is {top_p}: choose more than 0, up to 1 (all).", "bad-setting")


def _answers(tokenizer, rows: Sequence[_Row], final: bool = True) -> list[Answer]:
    texts = [parse_answer(text) for text in tokenizer.batch_decode([row.written for row in rows])]
    if not final:  # a character may span two tokens: show it when it is whole
        texts = [text.rstrip("\ufffd") for text in texts]
    return [Answer(t.strip(), [*row.written], row.stopped, row.prompt_cut) for t, row in zip(texts, rows)]


def adapter_scalings(model) -> list[dict[str, float]]:
    """Return what each layer's adapters are scaled by; nothing for a model without adapter."""
    return [layer.scaling for layer in model.modules() if isinstance(layer, LoraLayer)]


@contextmanager
def only_forward(model, adapters: Sequence[dict], sides: Sequence[str], one_thread: bool = False) -> Iterator[None]:
    """Run a forward of `model` in the block on rows of these `sides`, in evaluation mode, while no other thread does.

    In the rows of the base what an adapter adds is scaled by zero: `adapters` are the model's `adapter_scalings`, found
    once and not at each token. A model without adapter is the base on both sides. With `one_thread` torch shares
    nothing among threads. However the block ends, by Ctrl-C too, the model is left as it was.
    """
    with _FORWARD, torch.inference_mode():
        training, scalings, threads = model.training, [dict(scaling) for scaling in adapters], torch.get_num_threads()
        try:
            if training:
                model.eval()
            torch.set_num_threads(1 if one_thread else threads)
            if "base" in sides:
                tuned = torch.tensor([[[float(side == "tuned")]] for side in sides], device=model.device)
                for scaling in adapters:
                    scaling.update({name: scale * tuned for name, scale in scaling.items()})
            yield
        finally:
            for scaling, before in zip(adapters, scalings):
                scaling.update(before)
            torch.set_num_threads(threads)
            if training:
                model.train()


def _next_tokens(logits: torch.Tensor, generators, temperature, top_k, top_p) -> list[int]:
    """Return each row's next token id, from its logits, (rows, vocabulary)."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    up_to = warpers(None, logits).softmax(-1).cpu().double().cumsum(-1)  # on the CPU: Apple's MPS has no float64
    draws = torch.stack([1 - torch.rand(1, generator=random) for random in generators])  # above 0, up to 1
    return torch.searchsorted(up_to, draws * up_to[:, -1:])[:, 0].tolist()
