"""A conversation with a model: what was asked, with which settings, and what base and tuned answered."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .. import AlpacaError
from ..files import replace_file
from ..generation import Answer, check_settings, stream
from ..prompts import format_prompt
from .rendering import STYLE, as_html, as_markdown

DEFAULTS = {"max_new_tokens": 100, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "seed": 0}  # the document's


@dataclass
class Reply:
    """What one side has answered, in the end or so far."""

    side: str  # base or tuned
    answer: Answer = field(default_factory=lambda: Answer("", [], False, 0))
    ending: str = ""  # how it ended, for users; empty while it goes on
    seconds: float = field(default=0.0, repr=False)  # from the prompt to the last token


@dataclass
class Exchange:
    """A message and its replies; an exchange shows itself as static text in a notebook."""

    instruction: str
    input: str
    settings: dict  # of `generation.stream`
    replies: list[Reply]
    state: str = "waiting"  # then answering, then done
    error: str = ""  # why there is no answer, one sentence
    stop: threading.Event = field(default_factory=threading.Event, repr=False)  # set it to end the answers

    def _repr_html_(self) -> str:
        return STYLE + as_html(self, speed=False)


class Conversation:
    """Messages to one model in memory and its replies, one after the other; it shows itself as static text.

    `compare` asks base and tuned the same question, by default where the model has an adapter. The settings are those
    of `generation.stream`, where they differ from `DEFAULTS`; AlpacaError is raised for a bad one.
    """

    def __init__(self, model, tokenizer, compare: bool | None = None, **settings):
        self.model, self.tokenizer = model, tokenizer
        self.compare = hasattr(model, "peft_config") if compare is None else compare
        self.settings = check_settings(model, DEFAULTS | settings)
        self.exchanges: list[Exchange] = []
        self._turn = threading.Lock()  # never two generations at once

    def _repr_html_(self) -> str:
        return "".join([STYLE, *(as_html(exchange, speed=False) for exchange in self.exchanges)])

    def add(self, instruction: str, input: str = "", compare: bool | None = None, **settings) -> Exchange:
        """Return the new exchange, which waits for its answer; AlpacaError for a blank message or a bad setting."""
        if not (isinstance(instruction, str) and isinstance(input, str) and instruction.strip()):
            raise AlpacaError("The message is blank, or no text: type an instruction.")
        settings = check_settings(self.model, self.settings | settings)
        replies = [Reply("base")] if (self.compare if compare is None else compare) else []
        exchange = Exchange(well_formed(instruction), well_formed(input), settings, [*replies, Reply("tuned")])
        self.exchanges.append(exchange)
        return exchange

    def answer(self, exchange: Exchange) -> Iterator[Exchange]:
        """Answer a waiting exchange, yielding it after every token; what goes wrong becomes its `error`, no exception.

        Another answer that is under way is waited for; an exchange that has been answered yields nothing.
        """
        with self._turn:
            if exchange.state != "waiting":
                return
            exchange.state, start = "answering", time.perf_counter()
            sides = [reply.side for reply in exchange.replies]
            prompts = [format_prompt(exchange.instruction, exchange.input)] * len(sides)
            settings = {"sides": sides, "stop": exchange.stop, **exchange.settings}
            try:
                for answers in stream(self.model, self.tokenizer, prompts, **settings):
                    for reply, answer in zip(exchange.replies, answers):
                        if reply.ending:
                            continue
                        reply.answer, reply.seconds = answer, time.perf_counter() - start
                        if answer.stopped:
                            reply.ending = "ended by itself"
                        elif answer.tokens == settings["max_new_tokens"]:
                            reply.ending = "cut at the limit"
                    yield exchange
            except AlpacaError as error:
                exchange.error = str(error)
            except Exception as error:  # whatever it is, the next message must work
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                exchange.error = f"The model could not answer ({reason}): shorten the message, or change the settings."
            finally:
                for reply in exchange.replies:
                    reply.ending = reply.ending or ("broken off" if exchange.error else "stopped")
                exchange.state = "done"

    def save(self, path: str) -> Path:
        """Write the conversation as Markdown to a new file ending in .md, and return where it is.

        Raises AlpacaError for another name, a file that exists, and a place that cannot be written to.
        """
        place = Path(os.path.expanduser(path)).absolute()
        try:
            if place.suffix != ".md" or os.path.lexists(place):
                raise ValueError("it exists, or does not end in .md")
            replace_file(place, as_markdown(self.exchanges).encode())
        except (OSError, ValueError) as error:
            raise AlpacaError(f"{place} cannot be written ({error.args[-1]}): choose another name.") from error
        return place


def is_exit(text: str) -> bool:
    """Return whether the message ends the conversation, as in the document."""
    return text.strip().lower() in ("exit", "quit")


def well_formed(text: str) -> str:
    """Return the text with every half of a surrogate pair joined to its other half, or replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
