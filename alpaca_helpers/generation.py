"""Answers from a model: a batch at once or token by token, base or tuned, with one decoding loop for all."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from transformers import DynamicCache

from . import AlpacaError
from .prompts import encode, parse_answer

_FORWARD = threading.Lock()  # while a forward switches adapters off, no other thread may use the model
_SMALL = 4_000_000  # parameters times rows: to share less than this among threads takes longer than to do it


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt, in the end or so far."""

    text: str
    tokens: int  # written, without the end-of-text token
    stopped: bool  # it wrote the end-of-text token; else it was cut, or goes on
    prompt_cut: int  # tokens dropped from the front of a prompt too long for the model's positions


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
        decoding = _Decoding(model, tokenizer, [prompts[i] for i in chosen], [side] * len(chosen), **settings)
        for _ in decoding.steps():
            pass
        answers.update(zip(chosen, decoding.answers(final=True)))
    return [answers[index] for index in range(len(prompts))]


def stream(
    model, tokenizer, prompts: Sequence[str], *, sides: Sequence[str], stop: threading.Event | None = None, **settings
) -> Iterator[list[Answer]]:
    """Yield the answers so far, one a prompt, after each step; the last yield is the final one.

    All prompts are decoded in one batch, base and tuned rows side by side.

    Args:
        sides: `base` or `tuned`, one a prompt.
        stop: set it to end the answers where they are.
        settings: `max_new_tokens` (80); `temperature` (0: greedy); `top_k` (0: all) and `top_p` (1: all), what a
            sample is drawn from; `seed` (the same prompt, settings and seed give the same answer, in any batch).

    Raises AlpacaError for a setting out of range.
    """
    decoding = _Decoding(model, tokenizer, prompts, sides, **settings)
    for _ in decoding.steps():
        if stop is not None and stop.is_set():
            break
        yield decoding.answers(final=False)
    yield decoding.answers(final=True)


class _Decoding:
    """A batch of prompts being answered: what `generate` and `stream` share."""

    def __init__(self, model, tokenizer, prompts, sides, *, max_new_tokens=80, seed=0, **sampling):
        positions = model.config.n_positions
        for name, value in {"max_new_tokens": max_new_tokens, "seed": seed, "top_k": sampling.get("top_k", 0)}.items():
            if not isinstance(value, int) or abs(value) >= 2**63:
                raise AlpacaError(f"{name} is {value}: choose a whole number, of 18 digits at most.")
        if not 1 <= max_new_tokens < positions:
            raise AlpacaError(
                f"max_new_tokens is {max_new_tokens}: choose 1 to {positions - 1}, the model's positions."
            )
        if unknown := set(sides) - {"base", "tuned"}:
            raise AlpacaError(f"There is no side {sorted(unknown)[0]!r} of a model: choose base or tuned.")
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.eos = tokenizer.eos_token_id
        ids = encode(list(prompts), tokenizer)
        room = positions - max_new_tokens
        self.prompts = [row[-room:] or [self.eos] for row in ids]
        self.prompt_cut = [max(0, len(row) - room) for row in ids]
        self.sides, self.adapters = list(sides), adapter_scalings(model)
        self.choose = _sampler(seed, len(ids), **sampling)
        with _FORWARD:  # which may have changed the number for a while
            self.threads = torch.get_num_threads()
        if model.num_parameters() * len(ids) < _SMALL:
            self.threads = 1
        self.written: list[list[int]] = [[] for _ in ids]
        self.stopped = [False] * len(ids)

    def answers(self, final: bool) -> list[Answer]:
        texts = [parse_answer(text) for text in self.tokenizer.batch_decode(self.written)]
        if not final:  # a character may span two tokens: show it when it is whole
            texts = [text.rstrip("\ufffd") for text in texts]
        counts = map(len, self.written)
        return [Answer(t.strip(), *rest) for t, *rest in zip(texts, counts, self.stopped, self.prompt_cut)]

    def steps(self) -> Iterator[None]:
        """Add a token to every unfinished answer, once a step."""
        device, width = self.model.device, max(map(len, self.prompts))
        tokens = torch.tensor([[self.eos] * (width - len(row)) + row for row in self.prompts], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in self.prompts], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, rows = DynamicCache(config=self.model.config), list(range(len(self.prompts)))
        for _ in range(self.max_new_tokens):
            logits = self._forward(rows, tokens, mask, positions, cache)
            if logits.isnan().any():
                raise AlpacaError("The model's output is not a number: load it in float32, or train its adapter again.")
            chosen = self.choose(rows, logits)
            going = [token != self.eos for token in chosen]
            for row, token, goes in zip(rows, chosen, going):
                self.written[row] += [token] if goes else []
                self.stopped[row] = not goes
            yield
            if not any(going):
                return
            if not all(going):  # finished rows leave the batch
                left = torch.tensor([index for index, goes in enumerate(going) if goes], device=device)
                cache.batch_select_indices(left)
                mask, positions = mask[left], positions[left]
                rows = [row for row, goes in zip(rows, going) if goes]
            tokens = torch.tensor([[self.written[row][-1]] for row in rows], device=device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _forward(self, rows, tokens, mask, positions, cache) -> torch.Tensor:
        """Return the logits of each row's next token, float32, (rows, vocabulary)."""
        with only_forward(self.model, self.adapters, [self.sides[row] for row in rows]), _threads(self.threads):
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()


def adapter_scalings(model) -> list[dict[str, float]]:
    """Return what each layer's adapters are scaled by; nothing for a model without adapter."""
    return [layer.scaling for layer in model.modules() if isinstance(layer, LoraLayer)]


@contextmanager
def only_forward(model, adapters: Sequence[dict], sides: Sequence[str]) -> Iterator[None]:
    """Run a forward of `model` in the block on rows of these `sides`, in evaluation mode, while no other thread does.

    In the rows of the base what an adapter adds is scaled by zero. A model without adapter is the base on both
    sides. However the block ends, by Ctrl-C too, the model is left as it was.

    Args:
        adapters: the model's `adapter_scalings`, found once and not at each token.
    """
    with _FORWARD, torch.inference_mode():
        training, scalings = model.training, [dict(scaling) for scaling in adapters]
        try:
            if training:
                model.eval()
            if "base" in sides:
                tuned = torch.tensor([[[float(side == "tuned")]] for side in sides], device=model.device)
                for scaling in adapters:
                    scaling.update({name: scale * tuned for name, scale in scaling.items()})
            yield
        finally:
            for scaling, before in zip(adapters, scalings):
                scaling.update(before)
            if training:
                model.train()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads in the block."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _sampler(
    seed: int, rows: int, *, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0
) -> Callable[[list[int], torch.Tensor], list[int]]:
    """Return the function that picks each row's next token id from its logits."""
    if not (temperature == 0 or 0.01 <= temperature < math.inf):  # logits over less would overflow
        raise AlpacaError(f"temperature is {temperature}: choose 0 (greedy), or 0.01 or more.")
    if not 0 < top_p <= 1:
        raise AlpacaError(f"top_p is {top_p}: choose more than 0, up to 1 (all).")
    if top_k < 0:
        raise AlpacaError(f"top_k is {top_k}: choose 0 (all) or more.")
    if not 0 <= seed < 2**63:
        raise AlpacaError(f"seed is {seed}: choose 0 to 2**63 - 1.")
    if temperature == 0:
        return lambda _, logits: logits.argmax(-1).tolist()
    # a generator a row, on the CPU: the draw depends neither on the batch nor on the device
    generators = [torch.Generator().manual_seed(seed) for _ in range(rows)]

    def sample(chosen: list[int], logits: torch.Tensor) -> list[int]:
        odds = (logits / float(temperature)).softmax(-1).double()
        if top_k or top_p < 1:
            odds = odds * (odds >= _least(odds, top_k, top_p))
        up_to = odds.cumsum(-1)
        draws = torch.cat([1 - torch.rand(1, generator=generators[row]) for row in chosen])  # above 0, up to 1
        return torch.searchsorted(up_to, draws.to(odds.device)[:, None] * up_to[:, -1:])[:, 0].tolist()

    return sample


def _least(odds: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Return how likely a token must be to be drawn, (rows, 1): as likely as the least of the `top_k` likeliest, and of
    the fewest of these that make up `top_p` of their sum.
    """
    ranked = odds.topk(min(top_k or 256, odds.shape[-1])).values
    if not top_k and (ranked.sum(-1) < top_p).any():  # seldom, and sorting a vocabulary takes long
        ranked = odds.sort(descending=True).values
    before = (ranked.cumsum(-1) - ranked) / (ranked.sum(-1, keepdim=True) if top_k else 1)
    return ranked.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
