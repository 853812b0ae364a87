"""How a conversation reads, as text, JSON, Markdown and HTML: what users and models write is never markup in them."""

from __future__ import annotations

import html
import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for the annotations alone: conversation.py imports this module
    from .conversation import Exchange, Reply

SHOWN = 4000  # characters of one message on screen; a saved transcript has them all
WORDS = {"STOPPED": "ended by itself", "CUT": "cut at the limit", "INTERRUPTED": "stopped", "FAILED": "broken off"}
PICTURES = (  # of control characters, and of those that override the direction of text
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: "␡"}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
)


def visible(text: str) -> str:
    """Return the text with its control and direction-override characters as pictures (ESC is ␛): shown, not obeyed."""
    return text.translate(PICTURES)


def ending_words(reply: Reply) -> str:
    """Return how the reply ended; empty while it goes on."""
    return WORDS[reply.ending.name] if reply.ending else ""


def notes(reply: Reply, speed: bool = True) -> str:
    """Return the line under a reply: how it ended, how long it is, how fast it came, what was cut."""
    parts = [
        ending_words(reply),
        f"{reply.tokens} token{'s' * (reply.tokens != 1)}",
        f"{reply.speed:.0f} tokens/s" if speed and reply.tokens else "",
        f"the question was too long: its first {reply.prompt_cut} tokens were not read" if reply.prompt_cut else "",
    ]
    return " · ".join(filter(None, parts))


def as_text(exchanges: list[Exchange]) -> str:
    """Return the exchanges as plain text, without speeds."""
    lines = []
    for exchange in exchanges:
        lines += [f"You: {visible(exchange.instruction)}"]
        lines += [f"Input: {visible(exchange.input)}"] if exchange.input else []
        lines += [f"{reply.side}: {visible(reply.text)} [{notes(reply, speed=False)}]" for reply in exchange.replies]
        lines += [f"Error: {visible(exchange.error)}"] if exchange.error else []
    return "\n".join(lines)


def as_json(exchanges: list[Exchange]) -> str:
    """Return the exchanges as a JSON list of objects."""
    keys = ("instruction", "input", "settings", "replies", "error")
    content = [{key: getattr(exchange, key) for key in keys} for exchange in exchanges]
    return json.dumps(content, indent=2, ensure_ascii=False, default=_reply_fields) + "\n"


def _reply_fields(reply: Reply) -> dict:
    return vars(reply) | {"ending": ending_words(reply), "tokens_per_second": round(reply.speed, 1)}


def as_markdown(exchanges: list[Exchange]) -> str:
    """Return the exchanges as Markdown, every text in a fence longer than any run of backticks within."""
    parts = ["# Conversation"]
    for number, exchange in enumerate(exchanges, 1):
        parts += [f"## {number}. You", _fence(exchange.instruction)]
        parts += ["Input:", _fence(exchange.input)] if exchange.input else []
        for reply in exchange.replies:
            parts += [f"**{reply.side}** ({notes(reply)})", _fence(reply.text)]
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
    """Return the exchanges as static HTML, the same on every run of the same answers: without speeds."""
    return STYLE + "".join(exchange_html(exchange, speed=False) for exchange in exchanges) if exchanges else ""


def exchange_html(exchange: Exchange, speed: bool = True) -> str:
    """Return one exchange as HTML, without `STYLE`."""
    parts = [f'<div class="alpaca-chat"><div class="you"><b>You</b>{_bubble(exchange.instruction)}']
    parts += [_bubble(exchange.input, "input")] if exchange.input else []
    parts += ['</div><div class="replies">']
    going = exchange.state != "done"
    for reply in exchange.replies:
        under = "waiting for its turn" if exchange.state == "waiting" else notes(reply, speed)
        if going or reply.text or not exchange.error:
            bubble = _bubble(reply.text, "going" if going and not reply.ending else "")
            parts += [f'<div class="reply {reply.side}"><b>{reply.side}</b>{bubble}<small>{under}</small></div>']
    parts += ["</div>"]
    parts += [f'<div class="error" role="alert">{html.escape(visible(exchange.error))}</div>'] if exchange.error else []
    return "".join(parts) + "</div>"


def _bubble(text: str, kind: str = "") -> str:
    """Return text in a bubble: <pre> keeps MathJax away, <bdi> keeps the direction of one text from the next."""
    if len(text) > SHOWN:
        left_out = f"\n… {len(text) - SHOWN:,} characters not shown …\n"
        text = text[: SHOWN // 2] + left_out + text[-SHOWN // 2 :]
    return f'<pre dir="auto" class="bubble {kind}"><bdi>{html.escape(visible(text))}</bdi></pre>'


class Transcript:
    """Exchanges that show themselves in a notebook as static text, which nothing interprets; under a title: folded."""

    def __init__(self, exchanges: list[Exchange], title: str = ""):
        self.exchanges, self.title = list(exchanges), title

    def _repr_mimebundle_(self, **_) -> dict[str, str]:
        shown = as_html(self.exchanges)
        if self.title:
            shown = f'<details style="opacity: .8"><summary><small>{self.title}</small></summary>{shown}</details>'
        return {"text/html": shown, "text/plain": as_text(self.exchanges)}
