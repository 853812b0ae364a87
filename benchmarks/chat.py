"""How long the pocket's chat box makes one wait, without a browser.

The box gets the messages that a front end would send: Enter, then a tick every `TICK` seconds.
"""

import statistics
import time
import timeit
from functools import partial

import torch
from peft import get_peft_model

from alpaca_helpers.chat.box import TICK, ChatBox
from alpaca_helpers.generation import generate
from alpaca_helpers.lora import lora_config
from alpaca_helpers.models import load_tokenizer
from alpaca_helpers.pocket import MODEL
from alpaca_helpers.prompts import format_prompt

from .shared import in_turns, load_model

QUESTION = "What is the capital of France?"
SAMPLING = {"max_new_tokens": 100, "temperature": 0.7, "top_p": 0.9, "seed": 0}


def measure(rounds: int) -> dict[str, float]:
    """Return the medians over the rounds, by what they measure and in which unit.

    The pocket's adapter is untrained (it costs what a trained one does) and no answer may end before the limit, so
    that all answers have the same length.
    """
    model = get_peft_model(load_model("pocket"), lora_config()).eval()
    tokenizer = load_tokenizer(str(MODEL))

    def go_on(_, given, output):
        output.logits[..., tokenizer.eos_token_id] = -torch.inf

    model.register_forward_hook(go_on)
    box = ChatBox(model, tokenizer)
    box.ask(QUESTION)  # warm up
    answer = partial(generate, model, tokenizer, [format_prompt(QUESTION)], **SAMPLING)
    ways = {
        "plain": lambda: (0.0, timeit.timeit(answer, number=1)),
        "one": lambda: _ask_as_a_front_end(box, compare=False),
        "both": lambda: _ask_as_a_front_end(box, compare=True),
    }
    times = in_turns(ways, rounds)
    first = statistics.median(waited for way in ("one", "both") for waited, _ in times[way])
    plain, one, both = (statistics.median(total for _, total in times[way]) for way in ways)
    return {
        "first token after Enter (s)": round(first, 3),
        "streaming one answer, against generate (times its time)": round(one / plain, 3),
        "base and tuned together, against one answer (times its time)": round(both / one, 3),
        "tokens a second, generate (tokens/s)": round(SAMPLING["max_new_tokens"] / plain, 3),
    }


def _ask_as_a_front_end(box: ChatBox, compare: bool) -> tuple[float, float]:
    """Return the seconds from Enter to a first token on screen, and to the model's last token."""
    box.compare.value = compare
    start, waited = time.perf_counter(), 0.0
    box.field._handle_custom_msg({"event": "submit"}, [])
    box.field.value = QUESTION
    exchange, view = box.conversation.exchanges[-1], box.messages.children[-1]
    empty = view.value
    while not box.stop.disabled:
        time.sleep(TICK)
        box.play.value += 1
        if not waited and view.value != empty and exchange.replies[-1].answer.tokens:
            waited = time.perf_counter() - start
    return waited, exchange.replies[-1].seconds
