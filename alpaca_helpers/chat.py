"""The chat box of notebook 04, and the same assistant in a terminal: `python -m alpaca_helpers.chat --help`."""

import argparse
import html
import io
import signal
import sys
import threading
import time
from collections.abc import Iterator

import ipywidgets as widgets
from IPython.display import display

from . import AlpacaError
from .conversation import (
    DEFAULTS,
    SIDES,
    STYLE,
    Conversation,
    Exchange,
    as_html,
    as_text,
    exchange_html,
    is_exit,
    visible,
    well_formed,
)
from .lora import load_adapter
from .models import load_base, load_tokenizer
from .runs import artifact, read_record, run_folder

TICK = 0.05  # seconds between two looks at what the model has written
PLAYING = "playing" if widgets.Play.class_traits().get("playing") else "_playing"  # ipywidgets 8, 7
HELLO = '<div class="alpaca-chat hello">Ask something, as you would in a message. “exit” closes the chat.</div>'
WIDGET = "application/vnd.jupyter.widget-view+json"


class Transcript:
    """A conversation as static text, for the saved notebook: no widget, no script, nothing interpreted."""

    def __init__(self, exchanges: list[Exchange]):
        self.exchanges = list(exchanges)

    def _repr_mimebundle_(self, **_) -> dict[str, str]:
        return {"text/html": as_html(self.exchanges), "text/plain": as_text(self.exchanges)}


class _WellFormed:
    """Replaces half a character in what a front end sends: ipywidgets' echo of it would fail, and lose all."""

    def set_state(self, sync_data: dict) -> None:
        super().set_state({key: well_formed(v) if isinstance(v, str) else v for key, v in sync_data.items()})  # type: ignore[misc]


class _Text(_WellFormed, widgets.Text):
    pass


class _Textarea(_WellFormed, widgets.Textarea):
    pass


class ChatBox:
    """A chat with a model: the last expression of a cell shows it, `ask` talks through it in a script.

    Args:
        model: tuned (its adapter makes base and tuned answers from one model in memory) or plain.
        settings: those of `Conversation`: what the box starts with.

    Raises AlpacaError for a setting that does not exist.
    """

    # A thread generates and changes no widget, since updates from threads do not reach Colab's front end. The front
    # end itself asks for news: it plays a hidden animation whose every tick runs `_tick` in the kernel.

    def __init__(self, model, tokenizer, **settings):
        self.conversation = Conversation(model, tokenizer, **settings)
        self._lock = threading.RLock()  # JupyterLab may run callbacks beside the cell that runs `ask`
        self._live: list[tuple[Exchange, widgets.HTML]] = []  # messages that are not final, and where they are shown
        self._thread: threading.Thread | None = None
        self._entered = 0  # ticks to wait for the text of an Enter
        self._ticked = 0.0
        self._kept = None  # the handle of the static text under the box
        self.widget = self._build()

    # In a script

    def ask(self, instruction: str, input: str = "", **settings) -> Exchange:
        """Return the exchange with the model's answer, also shown in the box; `settings` hold for this message.

        Raises AlpacaError for a blank message or a bad setting, and where the model could not answer.
        """
        with self._lock:
            exchange = self._append(instruction, input, **settings)
        shown = 0.0
        for _ in self.conversation.answer(exchange):
            if time.monotonic() - shown > TICK:
                self._show()
                shown = time.monotonic()
        self._show()
        self._keep()
        if exchange.error:
            raise AlpacaError(exchange.error)
        return exchange

    def transcript(self) -> Transcript:
        """Return what was said, to be shown as static text."""
        return Transcript(self.conversation.exchanges)

    def __repr__(self) -> str:
        return f"ChatBox with {len(self.conversation.exchanges)} exchanges: run the cell to open it"

    def _ipython_display_(self, **_) -> None:
        _switch(self.composer, True)  # shown again, a closed chat is open
        self._say("")
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        display({WIDGET: view, "text/plain": repr(self)}, raw=True)
        self._kept = display(self._static(), raw=True, display_id=True)

    # The widgets

    def _build(self) -> widgets.VBox:
        settings = self.conversation.settings
        limit = self.conversation.model.config.n_positions - 1
        wide, small = widgets.Layout(width="100%"), widgets.Layout(width="auto")
        line = {"style": {"description_width": "90px"}, "layout": wide}
        # the front end keeps a reversed column at its end, so the newest message stays in sight without a script
        self.messages = widgets.VBox(layout=widgets.Layout(flex="0 0 auto", overflow="visible"))
        scroll = widgets.Layout(flex_flow="column-reverse", overflow="auto", height="420px", width="100%")
        self.hello = widgets.HTML(HELLO)
        self.status = widgets.HTML()
        self.field = _Text(placeholder="Type an instruction, Enter sends it", continuous_update=False)
        self.field.layout = widgets.Layout(flex="1 1 auto", width="auto")
        self.send = widgets.Button(description="Send", button_style="primary", layout=small)
        self.stop = widgets.Button(description="Stop", disabled=True, tooltip="End this answer here", layout=small)
        self.compare = widgets.ToggleButton(
            description="Compare with base", value=settings["sides"] == SIDES[0], layout=small
        )
        self.compare.disabled = not hasattr(self.conversation.model, "peft_config")
        self.with_input = widgets.ToggleButton(
            description="Input", tooltip="A text that the instruction is about", layout=small
        )
        self.with_settings = widgets.ToggleButton(description="Settings", layout=small)
        self.clear = widgets.Button(description="Clear", tooltip="Forget the conversation", layout=small)
        self.input = _Textarea(
            placeholder="Optional input: the text that the instruction is about", continuous_update=False, rows=3
        )
        self.input.layout = widgets.Layout(width="100%", display="none")
        self.knobs = {
            "temperature": widgets.FloatSlider(description="temperature", min=0, max=2, step=0.05, **line),
            "top_p": widgets.FloatSlider(description="top-p", min=0.05, max=1, step=0.05, **line),
            "top_k": widgets.IntSlider(description="top-k (0: all)", min=0, max=200, **line),
            "max_new_tokens": widgets.IntSlider(description="length", min=1, max=limit, **line),
            "seed": widgets.BoundedIntText(description="seed", min=0, max=2**31 - 1, **line),
        }
        for key, knob in self.knobs.items():
            knob.value = settings[key]
        self.path = _Text(value="chat.md", description="save as", tooltip=".md or .json", **line)
        self.save = widgets.Button(description="Save", layout=small)
        self.panel = widgets.VBox([*self.knobs.values(), widgets.HBox([self.path, self.save])])
        self.panel.layout = widgets.Layout(width="100%", display="none")
        self.play = widgets.Play(min=0, max=2**31 - 1, interval=int(TICK * 1000))
        self.play.layout = widgets.Layout(display="none")

        self.field.on_msg(self._on_field_message)
        self.field.observe(self._on_field_text, "value")
        self.play.observe(self._tick, "value")
        self.send.on_click(lambda _: self._submit())
        self.stop.on_click(lambda _: self._stop())
        self.clear.on_click(lambda _: self._clear())
        self.save.on_click(lambda _: self._save())
        for switch, part in ((self.with_input, self.input), (self.with_settings, self.panel)):
            switch.observe(lambda change, part=part: _switch(part, change["new"]), "value")
        buttons = widgets.HBox([self.compare, self.with_input, self.with_settings, self.clear])
        buttons.layout = widgets.Layout(width="100%", flex_flow="row wrap")
        self.composer = widgets.VBox(
            [self.input, widgets.HBox([self.field, self.send, self.stop], layout=wide), buttons, self.panel]
        )
        box = widgets.VBox(
            [
                widgets.HTML(STYLE),
                widgets.Box([self.messages, self.hello], layout=scroll),
                self.status,
                self.composer,
                self.play,
            ],
            layout=widgets.Layout(width="100%", max_width="1000px"),
        )
        return box.add_class("alpaca-box")

    # Messages in

    def _on_field_message(self, _, content, __) -> None:
        """Take Enter, which comes just before the text, or without it where the text came when the field lost focus."""
        if content.get("event") == "submit":
            with self._lock:
                self._entered = 2
                self._play()

    def _on_field_text(self, _) -> None:
        if self._entered:
            self._submit()

    def _submit(self) -> None:
        with self._lock:
            self._entered = 0
            text = well_formed(self.field.value)
            if is_exit(text):
                self.field.value = ""
                return self._close()
            settings = {key: knob.value for key, knob in self.knobs.items()}
            try:
                self._append(
                    text,
                    self.input.value if self.with_input.value else "",
                    sides=SIDES[0] if self.compare.value else SIDES[1],
                    **settings,
                )
            except AlpacaError as error:
                return self._say(str(error))
            self.field.value = ""
            self._show()
            self._play()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def _append(self, instruction: str, input: str, **settings) -> Exchange:
        exchange = self.conversation.add(instruction, input, **settings)
        view = widgets.HTML(exchange_html(exchange))
        self._live.append((exchange, view))
        self.messages.children = [*self.messages.children, view]
        _switch(self.hello, False)
        self._say("")
        return exchange

    def _work(self) -> None:
        while True:
            with self._lock:
                waiting = [exchange for exchange in self.conversation.exchanges if exchange.state == "waiting"]
                if not waiting:
                    self._thread = None
                    return
            for _ in self.conversation.answer(waiting[0]):
                pass

    # News out

    def _play(self) -> None:
        """Have the front end ask for news, anew if it has not asked lately: its page may have been reloaded."""
        if time.monotonic() - self._ticked > 1:
            setattr(self.play, PLAYING, False)
        setattr(self.play, PLAYING, True)

    def _tick(self, _) -> None:
        with self._lock:
            self._ticked = time.monotonic()
            if self._entered:
                self._entered -= 1
                if not self._entered:
                    self._submit()
            self._show()
            if not self._entered and not self._live:
                setattr(self.play, PLAYING, False)
                self._keep()

    def _show(self) -> None:
        """Bring the messages that are not final up to date."""
        with self._lock:
            for exchange, view in list(self._live):
                done = exchange.state == "done"  # looked at first: what is shown after is then final
                view.value = exchange_html(exchange)
                if done:
                    self._live.remove((exchange, view))
            self.stop.disabled = not self._live

    def _say(self, sentence: str) -> None:
        self.status.value = f'<div class="alpaca-chat" role="status">{html.escape(sentence)}</div>' if sentence else ""

    def _keep(self) -> None:
        """Write the conversation into the cell's output as static text, which a saved notebook keeps."""
        if self._kept is not None:
            self._kept.update(self._static(), raw=True)

    def _static(self) -> dict[str, str]:
        exchanges = self.conversation.exchanges
        title = f"Transcript ({len(exchanges)}), as the saved notebook keeps it"
        text = as_html(exchanges) if exchanges else ""
        return {
            "text/html": f'<details style="opacity: .8"><summary><small>{title}</small></summary>{text}</details>',
            "text/plain": as_text(exchanges),
        }

    # Buttons

    def _stop(self) -> None:
        """End the answer under way; a message that waits is then answered."""
        with self._lock:
            for exchange, _ in self._live:
                if exchange.state == "answering":
                    exchange.stop.set()
            self._play()

    def _clear(self) -> None:
        with self._lock:
            self._stop_all()
            self._live.clear()
            self.conversation.exchanges = []
            views, self.messages.children = self.messages.children, ()
            _switch(self.hello, True)
            for view in views:
                view.close()
            self._say("")
            self._keep()

    def _close(self) -> None:
        """Leave the conversation as it is and take no more messages."""
        with self._lock:
            self._stop_all()
            _switch(self.composer, False)
            self._say("The chat is closed: run its cell again to open it.")
            self._play()

    def _stop_all(self) -> None:
        for exchange in self.conversation.exchanges:
            exchange.stop.set()

    def _save(self) -> None:
        with self._lock:
            try:
                self._say(f"Saved to {self.conversation.save(self.path.value)}")
            except AlpacaError as error:
                self._say(str(error))


def _switch(part: widgets.Widget, on: bool) -> None:
    part.layout.display = "" if on else "none"


# In a terminal


def talk(conversation: Conversation, lines: Iterator[str]) -> None:
    """Answer the lines that a user types, until one says exit or there are no more."""
    for line in lines:
        if is_exit(line):
            return
        try:
            exchange = conversation.add(line)
        except AlpacaError as error:
            print(error)
            continue
        print_answer(conversation, exchange)
        print(f"{visible(exchange.error)}\n" if exchange.error else "")


def typed_lines() -> Iterator[str]:
    """Yield what the user types; Ctrl-C starts the line again, the end of input ends it."""
    while True:
        try:
            yield input("Instruction: ")
        except KeyboardInterrupt:
            print("\nType exit to leave.")
        except EOFError:
            return print()


def print_answer(conversation: Conversation, exchange: Exchange, notes: bool = True) -> None:
    """Print the first side's answer as it comes, then the other's; Ctrl-C ends them where they are."""
    several = len(exchange.replies) > 1
    before = signal.signal(signal.SIGINT, lambda *_: exchange.stop.set())
    try:
        printed = 0
        print(f"{exchange.replies[0].side}: " if several else "", end="", flush=True)
        for _ in conversation.answer(exchange):
            text = visible(exchange.replies[0].text)
            print(text[printed:], end="", flush=True)
            printed = len(text)
    finally:
        signal.signal(signal.SIGINT, before)
    for number, reply in enumerate(exchange.replies):
        print(f"\n{reply.side}: {visible(reply.text)}" if number else "", end="")
        print(f"\n  [{reply.notes()}]" if notes else "", end="")
    print(flush=True)


def open_run(run: str):
    """Return the tuned model and the tokenizer of a run; raise AlpacaError that says which notebook is missing."""
    folder = run_folder(run, make=False)
    adapter = artifact(folder, "adapter")
    made_of = read_record(folder, "training")
    name, revision = made_of["model"], made_of["model_revision"]
    print(f"Loading {name} and {adapter} …", file=sys.stderr, flush=True)
    return load_adapter(load_base(name, revision), adapter), load_tokenizer(name, revision)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alpaca_helpers.chat",
        description="Talk to the assistant of a run. Ctrl-C ends an answer; exit, quit or Ctrl-D ends the program.",
    )
    parser.add_argument("--run", default="pocket", help="name of the run, or a path to its folder (pocket)")
    parser.add_argument("--compare", action="store_true", help="base and tuned on the same question")
    parser.add_argument("--once", metavar="QUESTION", help="print one answer and leave, for scripts")
    parser.add_argument("--input", default="", metavar="TEXT", help="with --once: the text that the question is about")
    for key, value in DEFAULTS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    options = vars(parser.parse_args())
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # whatever bytes come in or cannot go out
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sides = SIDES[0] if options["compare"] else SIDES[1]
    conversation = Conversation(*open_run(options["run"]), sides=sides, **{key: options[key] for key in DEFAULTS})
    if options["once"] is None:
        print("The assistant of this run. Type exit to leave.\n")
        return talk(conversation, typed_lines())
    exchange = conversation.add(options["once"], options["input"])
    print_answer(conversation, exchange, notes=False)
    if exchange.error:
        raise AlpacaError(exchange.error)


if __name__ == "__main__":
    try:
        main()
    except AlpacaError as error:
        sys.exit(str(error))
