"""A conversation with a model: what was asked, with which settings, and what base and tuned answered."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import torch

from .. import AlpacaError
from ..files import replace_file
from ..generation import Answer, check_settings, stream
from ..prompts import format_prompt
from .rendering import STYLE, as_html, as_markdown

DEFAULTS = {"max_new_tokens": 100, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "seed": 0}  # the document's


class Ending(Enum):
    """How an answer ended; the value is what users read."""

    STOPPED = "ended by itself"  # the model wrote its end-of-text token
    CUT = "cut at the limit"  # max_new_tokens
    INTERRUPTED = "stopped"  # by the user
    FAILED = "broken off"  # by an error


@dataclass
class Reply:
    """What one side has answered, in the end or so far."""

    side: str  # base or tuned
    answer: Answer = Answer("", [], False, 0)
    ending: Ending | None = None  # None while it goes on
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

    The settings are `compare` (base and tuned on the same question; by default where the model has an adapter) and
    those of `generation.stream`, where they differ from `DEFAULTS`; AlpacaError is raised for a bad one.
    """

    def __init__(self, model, tokenizer, **settings):
        self.model, self.tokenizer = model, tokenizer
        self.exchanges: list[Exchange] = []
        self.settings = DEFAULTS | {"compare": hasattr(model, "peft_config")}
        self.settings = self._with(settings)
        self._turn = threading.Lock()  # never two generations at once

    def _repr_html_(self) -> str:
        return "".join([STYLE, *(as_html(exchange, speed=False) for exchange in self.exchanges)])

    def _with(self, given: dict) -> dict:
        if unknown := sorted(set(given) - set(self.settings)):
            known = ", ".join(self.settings)
            raise AlpacaError(f"The chat has no setting {unknown[0]!r}: choose among {known}.", "bad-setting")
        settings = self.settings | given
        check_settings(self.model, **{name: settings[name] for name in DEFAULTS})
        return settings

    def add(self, instruction: str, input: str = "", **settings) -> Exchange:
        """Return the new exchange, which waits for its answer; AlpacaError for a blank message or a bad setting."""
        if not (isinstance(instruction, str) and isinstance(input, str) and instruction.strip()):
            raise AlpacaError("The message is blank, or no text: type an instruction.", "blank-message")
        settings = self._with(settings)
        replies = [Reply("base"), Reply("tuned")] if settings.pop("compare") else [Reply("tuned")]
        exchange = Exchange(well_formed(instruction), well_formed(input), settings, replies)
        self.exchanges.append(exchange)
        return exchange

    def answer(self, exchange: Exchange) -> Iterator[Exchange]:
        """Answer a waiting exchange, yielding it after every token; what goes wrong becomes its `error`, no exception.

        Another answer that is under way is waited for; an exchange that has been answered yields nothing.
        """
        with self._turn:
            if exchange.state != "waiting":
                return
            exchange.state = "answering"
            sides = [reply.side for reply in exchange.replies]
            prompts = [format_prompt(exchange.instruction, exchange.input)] * len(sides)
            settings, start = {"sides": sides, "stop": exchange.stop, **exchange.settings}, time.perf_counter()
            try:
                if exchange.stop.is_set():
                    return
                for answers in stream(self.model, self.tokenizer, prompts, **settings):
                    for reply, answer in zip(exchange.replies, answers):
                        if reply.ending:
                            continue
                        reply.answer, reply.seconds = answer, time.perf_counter() - start
                        if answer.stopped:
                            reply.ending = Ending.STOPPED
                        elif answer.tokens == settings["max_new_tokens"]:
                            reply.ending = Ending.CUT
                    yield exchange
            except Exception as error:  # whatever it is, the next message must work
                exchange.error = _sentence(error)
            finally:
                for reply in exchange.replies:
                    reply.ending = reply.ending or (Ending.FAILED if exchange.error else Ending.INTERRUPTED)
                exchange.state = "done"

    def save(self, path: str | Path) -> Path:
        """Write the conversation as Markdown to a new file, and return where it is.

        Raises AlpacaError for a suffix other than .md, a file that exists, and a place that cannot be written to.
        """
        try:
            path = Path(path).expanduser().resolve()
            if path.suffix != ".md":
                raise ValueError("a name for Markdown ends in .md")
            if path.exists():
                raise FileExistsError("it exists already")
            replace_file(path, as_markdown(self.exchanges).encode())
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # such as a home folder of nobody, a null byte
            reason = getattr(error, "strerror", None) or error
            raise AlpacaError(f"{path} cannot be written ({reason}): choose another name.", "unwritable") from error
        return path


def is_exit(text: str) -> bool:
    """Return whether the message ends the conversation, as in the document."""
    return text.strip().lower() in ("exit", "quit")


def well_formed(text: str) -> str:
    """Return the text with every half of a surrogate pair joined to its other half, or replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _sentence(error: Exception) -> str:
    if isinstance(error, AlpacaError):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error):
        torch.cuda.empty_cache()  # nothing where there is no GPU
        return "The model ran out of memory on this message: shorten it, or lower max_new_tokens."
    reason = " ".join(str(error).split())[:200]
    return f"The model could not answer ({type(error).__name__}: {reason}): change the message or the settings."
