"""The same assistant in a terminal: it reads lines, and prints answers as they are written."""

import argparse
import signal
import sys

from .. import AlpacaError
from ..config import check_parameters
from ..lora import load_adapter
from ..models import load_base, load_tokenizer
from ..run import Run
from .conversation import DEFAULTS, Conversation, Exchange, is_exit
from .rendering import notes, visible


def talk(conversation: Conversation) -> None:
    """Answer what the user types, until it is exit or ends; Ctrl-C starts the line again."""
    while sys.stdin:  # None where it was closed
        try:
            line = input("Instruction: ")
            if is_exit(line):
                return
            print_answer(conversation, conversation.add(line))
            print()
        except KeyboardInterrupt:
            print("\nType exit to leave.")
        except EOFError:
            return print()
        except AlpacaError as error:
            print(f"{error}\n")


def print_answer(conversation: Conversation, exchange: Exchange, with_notes: bool = True) -> None:
    """Print the first side's answer as it comes, then the other's; Ctrl-C ends both. AlpacaError if there is none."""
    before = signal.signal(signal.SIGINT, lambda *_: exchange.stop.set())
    try:
        printed = 0
        print(f"{exchange.replies[0].side}: " if len(exchange.replies) > 1 else "", end="", flush=True)
        for _ in conversation.answer(exchange):
            text = visible(exchange.replies[0].answer.text)
            print(text[printed:], end="", flush=True)
            printed = len(text)
    finally:
        signal.signal(signal.SIGINT, before)
    for number, reply in enumerate(exchange.replies):
        other = f"\n{reply.side}: {visible(reply.answer.text)}" if number else ""
        print(other + (f"\n  [{notes(reply)}]" if with_notes else ""), end="")
    print(flush=True)
    if exchange.error:
        raise AlpacaError(visible(exchange.error))


def main() -> None:
    """Talk as the command line says; raise AlpacaError where there is no run, or no answer to `--once`."""
    keys = "Ctrl-C ends an answer; exit, quit or Ctrl-D ends the program."
    parser = argparse.ArgumentParser("python -m alpaca_helpers.chat", description=f"Talk to a run's assistant. {keys}")
    parser.add_argument("--run", default="pocket", help="name of the run, or a path to its folder (pocket)")
    parser.add_argument("--compare", action="store_true", help="base and tuned on the same question")
    parser.add_argument("--once", metavar="QUESTION", help="print one answer and leave, for scripts")
    parser.add_argument("--input", default="", metavar="TEXT", help="with --once: the text that the question is about")
    for key, value in DEFAULTS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    settings = vars(parser.parse_args())
    run, once, text = (settings.pop(key) for key in ("run", "once", "input"))
    if text and once is None:
        raise AlpacaError("--input goes with a question: give that by --once.")
    tuned = Run.named(check_parameters({"run": run})["run"], make=False)
    adapter, made = tuned.artifact("adapter"), tuned.record("adapter")
    source = made["model"], made["model_revision"]
    print(f"Loading {source[0]} and {adapter} …", file=sys.stderr, flush=True)
    conversation = Conversation(load_adapter(load_base(*source), adapter), load_tokenizer(*source), **settings)
    if once is not None:
        exchange = conversation.add(once, text)
        print_answer(conversation, exchange, with_notes=False)
        if cut := exchange.replies[0].answer.prompt_cut:
            print(f"The first {cut} tokens of the question were not read: the model has no room.", file=sys.stderr)
        return
    print("The assistant of this run. Type exit to leave.\n")
    talk(conversation)
