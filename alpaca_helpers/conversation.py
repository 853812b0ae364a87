"""A conversation with a model: what was asked, what base and tuned answered, and how that reads as text."""

import html
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from . import AlpacaError
from .generation import Answer, stream
from .prompts import format_prompt

DEFAULTS = {"max_new_tokens": 100, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "seed": 0}  # the document's
SIDES = (("base", "tuned"), ("tuned",))
SHOWN = 4000  # characters of one message on screen; a saved transcript has them all


@dataclass(frozen=True)
class Reply:
    """What one side has answered, in the end or so far."""

    side: str  # base or tuned
    text: str = ""
    tokens: int = 0
    ending: str = ""  # how it ended; empty while it goes on
    prompt_cut: int = 0  # tokens that the model did not read, from the front of the prompt
    seconds: float = 0.0  # from the prompt to the last token

    @property
    def speed(self) -> float:
        """Tokens a second, the first one's wait included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def notes(self, speed: bool = True) -> str:
        """Return the line under the answer: how it ended, how long it is, how fast it came, what was cut."""
        notes = [self.ending] if self.ending else []
        notes.append(f"{self.tokens} token{'s' * (self.tokens != 1)}")
        if speed and self.tokens:
            notes.append(f"{self.speed:.0f} tokens/s")
        if self.prompt_cut:
            notes.append(f"the question was too long: its first {self.prompt_cut} tokens were not read")
        return " · ".join(notes)


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
        self.settings = DEFAULTS | {"sides": ("base", "tuned") if hasattr(model, "peft_config") else ("tuned",)}
        self.settings = self._checked(settings)
        self._turn = threading.Lock()  # never two generations at once

    def add(self, instruction: str, input: str = "", **settings) -> Exchange:
        """Return the new exchange at the end of the conversation, waiting for its answer.

        Raises AlpacaError for a blank message, or a setting that does not exist.
        """
        instruction, input = well_formed(instruction), well_formed(input)
        if not instruction.strip():
            raise AlpacaError("The message is blank: type an instruction.")
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
            sides, settings = exchange.settings["sides"], dict(exchange.settings)
            del settings["sides"]
            prompts = [format_prompt(exchange.instruction, exchange.input)] * len(sides)
            start = time.perf_counter()
            try:
                if exchange.stop.is_set():
                    return
                for answers in stream(self.model, self.tokenizer, prompts, sides=sides, stop=exchange.stop, **settings):
                    seconds, limit = time.perf_counter() - start, settings["max_new_tokens"]
                    exchange.replies = tuple(_reply(*pair, seconds, limit) for pair in zip(exchange.replies, answers))
                    yield exchange
            except Exception as error:  # whatever it is, the next message must work
                exchange.error = _sentence(error)
            finally:
                ended = "broken off" if exchange.error else "stopped"
                exchange.replies = tuple(
                    reply if reply.ending else replace(reply, ending=ended) for reply in exchange.replies
                )
                exchange.state = "done"

    def save(self, path: str | Path) -> Path:
        """Write the conversation as Markdown or JSON, by the suffix of `path`, and return where it is.

        Raises AlpacaError for another suffix, or a place that cannot be written to.
        """
        path = Path(path).expanduser().resolve()
        write = {".md": as_markdown, ".json": as_json}.get(path.suffix)
        if write is None:
            raise AlpacaError(f"{path.name} is neither .md nor .json: choose one of these suffixes.")
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(write(self.exchanges), encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise AlpacaError(f"{path} cannot be written ({error.strerror}): choose another place.") from error
        return path

    def _checked(self, settings: dict) -> dict:
        settings = {key: tuple(value) if key == "sides" else value for key, value in settings.items()}
        if settings.get("sides", ("tuned",)) not in SIDES:
            raise AlpacaError(f"There are no sides {settings['sides']}: choose {' or '.join(map(str, SIDES))}.")
        if unknown := set(settings) - set(self.settings):
            raise AlpacaError(
                f"The chat has no setting {sorted(unknown)[0]!r}: choose among {', '.join(self.settings)}."
            )
        return self.settings | settings


def is_exit(text: str) -> bool:
    """Return whether the message ends the conversation, as in the document."""
    return text.strip().lower() in ("exit", "quit")


def well_formed(text: str) -> str:
    """Return the text with every half of a surrogate pair joined to its other half, or replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def visible(text: str) -> str:
    """Return the text with its control and direction-override characters as pictures (ESC is ␛): shown, not obeyed."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", _picture, text)


def _picture(found: re.Match) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"


def _reply(old: Reply, new: Answer, seconds: float, limit: int) -> Reply:
    """Return the reply with what the model has written by now; a finished one keeps its time."""
    if old.ending:
        return old
    ending = "ended by itself" if new.stopped else "cut at the limit" if new.tokens == limit else ""
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


# How a conversation reads. Text of users and models is data in all of them: escaped, quoted or fenced, never markup.


def as_text(exchanges: list[Exchange]) -> str:
    """Return the conversation as plain text."""
    lines = []
    for exchange in exchanges:
        lines += [f"You: {visible(exchange.instruction)}"]
        lines += [f"Input: {visible(exchange.input)}"] if exchange.input else []
        lines += [f"{reply.side}: {visible(reply.text)} [{reply.notes(speed=False)}]" for reply in exchange.replies]
        lines += [f"Error: {visible(exchange.error)}"] if exchange.error else []
    return "\n".join(lines)


def as_json(exchanges: list[Exchange]) -> str:
    """Return the conversation as JSON: an object an exchange."""
    content = [
        {
            "instruction": exchange.instruction,
            "input": exchange.input,
            "settings": exchange.settings,
            "replies": [vars(reply) | {"tokens_per_second": round(reply.speed, 1)} for reply in exchange.replies],
            "error": exchange.error,
        }
        for exchange in exchanges
    ]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def as_markdown(exchanges: list[Exchange]) -> str:
    """Return the conversation as Markdown, every text in a fence longer than any run of backticks within."""
    parts = ["# Conversation"]
    for number, exchange in enumerate(exchanges, 1):
        parts += [f"## {number}. You", _fence(exchange.instruction)]
        parts += ["Input:", _fence(exchange.input)] if exchange.input else []
        for reply in exchange.replies:
            parts += [f"**{reply.side}** ({reply.notes()})", _fence(reply.text)]
        parts += ["Error:", _fence(exchange.error)] if exchange.error else []
    return "\n\n".join(parts) + "\n"


def _fence(text: str) -> str:
    fence = "`" * max([2, *(len(run) for run in re.findall("`+", text))]) + "`"
    return f"{fence}text\n{text}\n{fence}"


# Jupyter's themes, Colab's and a bare page differ in their colours: the bubbles tint what is behind them and keep the
# text's own colour, but for the one that brings both.
STYLE = """<style>
.alpaca-box {border: 1px solid rgba(128, 128, 128, .35); border-radius: 12px; padding: 8px}
.alpaca-chat {line-height: 1.45; font-size: 14px; font-family: system-ui, -apple-system, "Segoe UI", sans-serif;
  white-space: normal; padding: 2px 6px 8px}
.alpaca-chat.hello {text-align: center; opacity: .65; padding: 150px 10px}
.alpaca-chat .you {display: flex; flex-direction: column; align-items: flex-end; margin: 8px 0 6px 12%}
.alpaca-chat .replies {display: flex; flex-wrap: wrap; gap: 8px 10px}
.alpaca-chat .reply {flex: 1 1 240px; min-width: 0; display: flex; flex-direction: column; align-items: flex-start}
.alpaca-chat .reply:only-child {margin-right: 12%}
.alpaca-chat .bubble.bubble {font: inherit; color: inherit; white-space: pre-wrap; overflow-wrap: anywhere;
  word-break: normal; text-align: start; margin: 2px 0; padding: 8px 13px; border: 0; border-radius: 16px;
  max-width: 100%; box-sizing: border-box; min-height: 37px}
.alpaca-chat .you .bubble.bubble {background: #1b62b5; color: #fff; border-bottom-right-radius: 4px}
.alpaca-chat .you .input.bubble.bubble {background: none; color: inherit; border: 1px dashed rgba(128, 128, 128, .7)}
.alpaca-chat .reply .bubble.bubble {border-bottom-left-radius: 4px}
.alpaca-chat .base .bubble.bubble {background: rgba(128, 128, 128, .18)}
.alpaca-chat .tuned .bubble.bubble {background: rgba(46, 160, 90, .22)}
.alpaca-chat b {font-size: 12px; font-weight: 600; margin: 0 4px; opacity: .8}
.alpaca-chat small {font-size: 12px; margin: 0 4px; opacity: .75}
.alpaca-chat .error {background: rgba(211, 47, 47, .15); border: 1px solid rgba(211, 47, 47, .6);
  border-radius: 10px; padding: 6px 12px; margin: 4px 0}
.alpaca-chat .going::after {content: "\\258d"; opacity: .6; animation: alpaca-blink 1s steps(2) infinite}
@keyframes alpaca-blink {50% {opacity: 0}}
@media (prefers-reduced-motion: reduce) {.alpaca-chat .going::after {animation: none}}
</style>"""


def as_html(exchanges: list[Exchange]) -> str:
    """Return the conversation as static HTML, the same on every run of the same answers: without speeds."""
    return STYLE + "".join(exchange_html(exchange, speed=False) for exchange in exchanges)


def exchange_html(exchange: Exchange, speed: bool = True) -> str:
    """Return one exchange as HTML, without `STYLE`."""
    parts = [f'<div class="alpaca-chat"><div class="you"><b>You</b>{_bubble(exchange.instruction)}']
    parts += [_bubble(exchange.input, "input")] if exchange.input else []
    parts += ['</div><div class="replies">']
    going = exchange.state != "done"
    for reply in exchange.replies:
        notes = "waiting for its turn" if exchange.state == "waiting" else reply.notes(speed)
        if going or reply.text or not exchange.error:
            bubble = _bubble(reply.text, "going" if going and not reply.ending else "")
            parts += [f'<div class="reply {reply.side}"><b>{reply.side}</b>{bubble}<small>{notes}</small></div>']
    parts += ["</div>"]
    parts += [f'<div class="error" role="alert">{html.escape(visible(exchange.error))}</div>'] if exchange.error else []
    return "".join(parts) + "</div>"


def _bubble(text: str, kind: str = "") -> str:
    """Return text in a bubble: <pre> keeps MathJax away, <bdi> keeps the direction of one text from the next."""
    if len(text) > SHOWN:
        left_out = f"\n… {len(text) - SHOWN:,} characters not shown …\n"
        text = text[: SHOWN // 2] + left_out + text[-SHOWN // 2 :]
    return f'<pre dir="auto" class="bubble {kind}"><bdi>{html.escape(visible(text))}</bdi></pre>'
