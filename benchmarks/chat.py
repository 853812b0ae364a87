"""How long the pocket's chat box makes one wait, without a browser: python -m benchmarks.chat

The box gets the messages that a front end would send: Enter, then a tick every `TICK` seconds.
"""

import statistics
import time

import torch
from peft import get_peft_model

from alpaca_helpers import pocket
from alpaca_helpers.chat.box import TICK, ChatBox
from alpaca_helpers.generation import generate
from alpaca_helpers.lora import lora_config
from alpaca_helpers.models import load_base, load_tokenizer
from alpaca_helpers.prompts import format_prompt

QUESTION = "What is the capital of France?"
SAMPLING = {"max_new_tokens": 100, "temperature": 0.7, "top_p": 0.9, "seed": 0}


def measure(repeats: int = 15) -> list[dict]:
    """Return one row a figure: `what`, the median `value`, its `unit`, its `target`, and whether that is reached.

    The pocket's adapter is untrained (it costs what a trained one does) and no answer may end before the limit, so
    that all answers have the same length.
    """
    tokenizer = load_tokenizer(str(pocket.MODEL))
    model = get_peft_model(load_base(str(pocket.MODEL)), lora_config()).eval()

    def go_on(_, given, output):
        output.logits[..., tokenizer.eos_token_id] = -torch.inf

    model.register_forward_hook(go_on)
    box = ChatBox(model, tokenizer)
    box.ask(QUESTION)  # warm up
    plain, one, both, first = [], [], [], []
    for _ in range(repeats):  # in turns, so that a busy moment of the machine falls on all of them
        start = time.perf_counter()
        generate(model, tokenizer, [format_prompt(QUESTION)], **SAMPLING)
        plain.append(time.perf_counter() - start)
        for compare, seconds in ((False, one), (True, both)):
            box.compare.value = compare
            waited, total = _ask_as_a_front_end(box)
            first.append(waited)
            seconds.append(total)
    plain, one, both, first = map(statistics.median, (plain, one, both, first))
    rows = [
        ("first token after Enter", first, "s", 0.2),
        ("streaming one answer, against generate", one / plain, "times its time", 1.2),
        ("base and tuned together, against one answer", both / one, "times its time", 1.3),
        ("tokens a second, generate", SAMPLING["max_new_tokens"] / plain, "tokens/s", None),
    ]
    return [
        {
            "what": what,
            "value": round(value, 3),
            "unit": unit,
            "target": target,
            "reached": not target or value <= target,
        }
        for what, value, unit, target in rows
    ]


def _ask_as_a_front_end(box: ChatBox) -> tuple[float, float]:
    """Return the seconds from Enter to a first token on screen, and to the model's last token."""
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


if __name__ == "__main__":
    for row in measure():
        print(f"{row['what']:45} {row['value']:8} {row['unit']:15} target {row['target']}, reached: {row['reached']}")
