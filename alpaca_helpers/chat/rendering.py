"""How a conversation reads, as Markdown and HTML: what users and models write is never markup in them."""

import html
import re

SHOWN = 4000  # characters of one message on screen; a saved conversation has them all
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # and overrides of direction
# Jupyter's themes, Colab's and a bare page differ in their colours: the bubbles tint what is behind them and keep the
# text's own colour, but for the one that brings both.
STYLE = """<style>
.alpaca-box {border: 1px solid #8886; border-radius: 12px; padding: 8px}
.alpaca-chat {font: 14px/1.45 system-ui, sans-serif; white-space: normal; padding: 2px 6px 8px}
.alpaca-chat .you {display: flex; flex-direction: column; align-items: flex-end; margin: 8px 0 6px 12%}
.alpaca-chat .replies {display: flex; flex-wrap: wrap; gap: 8px 10px}
.alpaca-chat .reply {flex: 1 1 240px; min-width: 0}
.alpaca-chat .bubble.bubble {font: inherit; color: inherit; background: #8883; white-space: pre-wrap;
  word-break: normal; overflow-wrap: anywhere; text-align: start; width: fit-content; max-width: 100%; min-height: 37px;
  box-sizing: border-box; margin: 2px 0; padding: 8px 13px; border: 0; border-radius: 14px}
.alpaca-chat .you .bubble.bubble {background: #1b62b5; color: #fff}
.alpaca-chat .input.bubble.bubble {background: none; color: inherit; border: 1px dashed #888a}
.alpaca-chat .tuned .bubble.bubble {background: #2ea05a3a}
.alpaca-chat b, .alpaca-chat small {font-size: 12px; margin: 0 4px; opacity: .8}
.alpaca-chat .error {border: 1px solid #d32f2f; border-radius: 10px; padding: 6px 12px; margin: 4px 0}
.alpaca-chat .going::after {content: "\\258d"; opacity: .6}
</style>"""


def visible(text: str) -> str:
    """Return the text with U+FFFD in place of each character that controls a terminal or the direction of text."""
    return CONTROLS.sub("\ufffd", text)


def notes(reply, speed: bool = True) -> str:
    """Return the line under a reply: how it ended, how long it is, how fast it came, what was cut."""
    tokens, cut = reply.answer.tokens, reply.answer.prompt_cut
    parts = [reply.ending, f"{tokens} token{'s' * (tokens != 1)}"]
    if speed and reply.seconds:
        parts.append(f"{tokens / reply.seconds:.0f} tokens/s")
    if cut:
        parts.append(f"the question was too long: its first {cut} tokens were not read")
    return " · ".join(filter(None, parts))


def as_markdown(exchanges) -> str:
    """Return the exchanges and their settings as Markdown, texts in fences longer than any run of backticks within."""
    parts = ["# Conversation"]
    for number, exchange in enumerate(exchanges, 1):
        parts += [f"## {number} ({', '.join(f'{name} {value}' for name, value in exchange.settings.items())})"]
        said = [("**You**", exchange.instruction)]
        said += [("**Input**", exchange.input)] * bool(exchange.input)
        said += [(f"**{reply.side}** ({notes(reply)})", reply.answer.text) for reply in exchange.replies]
        said += [("**Error**", exchange.error)] * bool(exchange.error)
        for who, text in said:
            fence = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
            parts += [who, f"{fence}text\n{text}\n{fence}"]
    return "\n\n".join(parts) + "\n"


def as_html(exchange, speed: bool = True) -> str:
    """Return an exchange as HTML, without `STYLE`; without speeds it is the same on every run."""
    asked = _bubble(exchange.instruction) + (_bubble(exchange.input, "input") if exchange.input else "")
    parts = [f'<div class="you"><b>You</b>{asked}</div><div class="replies">']
    for reply in exchange.replies:
        note = "waiting for its turn" if exchange.state == "waiting" else notes(reply, speed)
        bubble = _bubble(reply.answer.text, "" if reply.ending else "going")
        if reply.answer.text or not exchange.error:
            parts += [f'<div class="reply {reply.side}"><b>{reply.side}</b>{bubble}<small>{note}</small></div>']
    parts.append("</div>")
    if exchange.error:
        parts.append(f'<div class="error" role="alert">{html.escape(visible(exchange.error))}</div>')
    return f'<div class="alpaca-chat">{"".join(parts)}</div>'


def _bubble(text: str, kind: str = "") -> str:
    """Return text in a bubble: <pre> keeps MathJax away, <bdi> keeps the direction of one text from the next."""
    if len(text) > SHOWN:
        left_out = f"\n… {len(text) - SHOWN:,} characters not shown …\n"
        text = text[: SHOWN // 2] + left_out + text[-SHOWN // 2 :]
    return f'<pre dir="auto" class="bubble {kind}"><bdi>{html.escape(visible(text))}</bdi></pre>'
