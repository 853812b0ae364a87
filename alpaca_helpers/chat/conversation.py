"""A conversation with a model: what was asked, with which settings, and what base and tuned answered."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from pathlib import Path
from secrets import token_hex

import torch

from .. import AlpacaError
from ..generation import Answer, stream
from ..prompts import format_prompt
from .rendering import as_html, as_json, as_markdown, as_text

DEFAULTS = {"max_new_tokens": 100, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "seed": 0}  # the document's
SIDES = (("base", "tuned"), ("tuned",))


class Ending(Enum):
    """How an answer ended."""

    STOPPED = auto()  # by itself: the model wrote its end-of-text token
    CUT = auto()  # at max_new_tokens
    INTERRUPTED = auto()  # by the user
    FAILED = auto()  # by an error


@dataclass(frozen=True)
class Reply:
    """What one side has answered, in the end or so far."""

    side: str  # base or tuned
    text: str = ""
    tokens: int = 0
    ending: Ending | None = None  # None while it goes on
    prompt_cut: int = 0  # tokens that the model did not read, from the front of the prompt
    seconds: float = 0.0  # from the prompt to the last token

    @property
    def speed(self) -> float:
        """Tokens a second, the first one's wait included."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Exchange:
    """A message and its replies; an exchange shows itself as static text in a notebook."""

    instruction: str
    input: str
    settings: dict
    replies: tuple[Reply, ...]
    state: str = "waiting"  # then answering, then done
    error: str = ""  # why there is no answer, one sentence
    stop: threading.Event = field(default_factory=threading.Event)  # set it to end the answers where they are

    def __repr__(self) -> str:
        return as_text([self])

    def _repr_html_(self) -> str:
        return as_html([self])


class Conversation:
    """Messages to one model in memory and its replies, one after the other.

    Args:
        settings: `sides` (by default base and tuned where the model has an adapter, else tuned alone) and those of
            `generation.stream`, where they differ from `DEFAULTS`.

    Raises AlpacaError for a setting that does not exist.
    """

    def __init__(self, model, tokenizer, **settings):
        self.model, self.tokenizer = model, tokenizer
        self.exchanges: list[Exchange] = []
        self.settings = DEFAULTS | {"sides": SIDES[0] if hasattr(model, "peft_config") else SIDES[1]}
        self.settings = self._checked(settings)
        self._turn = threading.Lock()  # never two generations at once
        self._saved: dict[Path, bytes] = {}  # what `save` has written

    def add(self, instruction: str, input: str = "", **settings) -> Exchange:
        """Return the new exchange at the end of the conversation, waiting for its answer.

        Raises AlpacaError for a blank message, or a setting that does not exist.
        """
        instruction, input = well_formed(instruction), well_formed(input)
        if not instruction.strip():
            raise AlpacaError("The message is blank: type an instruction.", "blank-message")
        settings = self._checked(settings)
        exchange = Exchange(instruction, input, settings, tuple(Reply(side) for side in settings["sides"]))
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
            settings = dict(exchange.settings)
            sides, limit = settings.pop("sides"), settings["max_new_tokens"]
            prompts = [format_prompt(exchange.instruction, exchange.input)] * len(sides)
            start = time.perf_counter()
            try:
                if exchange.stop.is_set():
                    return
                for answers in stream(self.model, self.tokenizer, prompts, sides=sides, stop=exchange.stop, **settings):
                    seconds = time.perf_counter() - start
                    exchange.replies = tuple(_reply(*pair, seconds, limit) for pair in zip(exchange.replies, answers))
                    yield exchange
            except Exception as error:  # whatever it is, the next message must work
                exchange.error = _sentence(error)
            finally:
                ended = Ending.FAILED if exchange.error else Ending.INTERRUPTED
                exchange.replies = tuple(replace(reply, ending=reply.ending or ended) for reply in exchange.replies)
                exchange.state = "done"

    def save(self, path: str | Path) -> Path:
        """Write the conversation as Markdown or JSON, by the suffix of `path`, and return where it is.

        Raises AlpacaError for another suffix, a place that cannot be written to, and a file that is there already,
        unless it is as this conversation was last saved to it.
        """
        try:
            path = Path(path).expanduser().resolve()
            write = {".md": as_markdown, ".json": as_json}.get(path.suffix)
            if write is None:
                raise AlpacaError(f"{path.name} is neither .md nor .json: choose one of these suffixes.", "bad-suffix")
            content = write(self.exchanges).encode()
            part = path.with_name(f".{token_hex(8)}.part")
            try:
                part.write_bytes(content)
                if not (path in self._saved and path.is_file() and path.read_bytes() == self._saved[path]):
                    path.touch(exist_ok=False)  # fails if it exists, also if another program has just made it
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        except FileExistsError as error:
            raise AlpacaError(
                f"{path} exists and is not as this chat saved it, so it is kept: choose another name.", "file-exists"
            ) from error
        except (OSError, RuntimeError, ValueError) as error:  # such as a home folder of nobody, a null byte
            reason = getattr(error, "strerror", None) or error
            raise AlpacaError(f"{path} cannot be written ({reason}): choose another place.", "unwritable") from error
        self._saved[path] = content
        return path

    def _checked(self, given: dict) -> dict:
        if unknown := sorted(set(given) - set(self.settings)):
            known = ", ".join(self.settings)
            raise AlpacaError(f"The chat has no setting {unknown[0]!r}: choose among {known}.", "bad-setting")
        settings = self.settings | given
        settings["sides"] = tuple(settings["sides"])
        if settings["sides"] not in SIDES:
            known = " or ".join(map(str, SIDES))
            raise AlpacaError(f"There are no sides {settings['sides']}: choose {known}.", "bad-setting")
        return settings


def is_exit(text: str) -> bool:
    """Return whether the message ends the conversation, as in the document."""
    return text.strip().lower() in ("exit", "quit")


def well_formed(text: str) -> str:
    """Return the text with every half of a surrogate pair joined to its other half, or replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _reply(old: Reply, new: Answer, seconds: float, limit: int) -> Reply:
    """Return the reply with what the model has written by now; a finished one keeps its time."""
    if old.ending:
        return old
    ending = Ending.STOPPED if new.stopped else Ending.CUT if new.tokens == limit else None
    return Reply(old.side, new.text, new.tokens, ending, new.prompt_cut, seconds)


def _sentence(error: Exception) -> str:
    if isinstance(error, AlpacaError):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "The model ran out of memory on this message: shorten it, or lower the length."
    reason = " ".join(str(error).split())[:200]
    return f"The model could not answer ({type(error).__name__}: {reason}): change the message or the settings."
