"""The chat box of notebook 04, of core ipywidgets alone: the same in JupyterLab and on Colab."""

import html
import threading
import time
from collections.abc import Callable

import ipywidgets as widgets
from IPython.display import HTML, display

from .. import AlpacaError
from .conversation import Conversation, Exchange, is_exit, well_formed
from .rendering import STYLE, as_html

SLIDERS = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0)}  # the settings with two ends
TICK = 0.05  # seconds between two looks at what the model has written
PLAYING = "playing" if widgets.Play.class_traits().get("playing") else "_playing"  # ipywidgets 8, 7
WIDE = {"width": "100%"}


def _text(kind, **options) -> widgets.Widget:
    """Return a field that replaces half a character in what it is sent, since ipywidgets could not echo it."""
    field = kind(continuous_update=False, **options)
    take = field.set_state
    field.set_state = lambda sent: take({key: well_formed(v) if isinstance(v, str) else v for key, v in sent.items()})
    return field


class ChatBox:
    """A chat with a model: the last expression of a cell shows it, `ask` talks through it in a script.

    The model is tuned (its adapter makes base and tuned answers from one model in memory) or plain. The settings, which
    the box starts with, and the errors are those of `Conversation`.
    """

    # A thread generates and changes no widget, since updates from threads do not reach Colab's front end. The front
    # end itself asks for news: it plays a hidden animation whose every tick runs `_tick` in the kernel.

    def __init__(self, model, tokenizer, **settings):
        self.conversation = Conversation(model, tokenizer, **settings)
        self._lock = threading.RLock()  # JupyterLab may run callbacks beside the cell that runs `ask`
        self._entered = 0  # ticks to wait for the text of an Enter
        self._shown = 0.0  # when `_show` last ran
        self._kept = None  # the handle of the static text under the box
        self.widget = self._build()

    def ask(self, instruction: str, input: str = "", **settings) -> Exchange:
        """Return the exchange with the model's answer, also shown in the box; `settings` hold for this message.

        Raises AlpacaError for a blank message or a bad setting, and where the model could not answer.
        """
        with self._lock:
            exchange = self.conversation.add(instruction, input, **settings)
            self._say("")
        for _ in self.conversation.answer(exchange):
            if time.monotonic() - self._shown > TICK:
                self._show()
        self._show()
        self._keep()
        if exchange.error:
            raise AlpacaError(exchange.error)
        return exchange

    def _ipython_display_(self, **_) -> None:
        self.composer.layout.display = ""  # shown again, a closed chat is open
        self._say("")
        display(self.widget)
        self._kept = display(HTML(), display_id=True)
        self._keep()

    def _build(self) -> widgets.VBox:
        stretch, fit = {"flex": "1 1 auto", "width": "auto"}, {"width": "auto"}
        line = {"style": {"description_width": "120px"}, "layout": stretch}
        asks = "Type an instruction, Enter sends it; exit closes the chat"
        self.field = _text(widgets.Text, placeholder=asks, layout=stretch)
        about = "Optional input: the text that the instruction is about"
        self.input = _text(widgets.Textarea, placeholder=about, rows=3, layout=WIDE)
        self.path = _text(widgets.Text, value="chat.md", description="save as", **line)
        buttons = [widgets.Button(description=name, layout=fit) for name in ("Send", "Stop", "Clear", "Save")]
        self.send, self.stop, self.clear, self.save = buttons
        self.send.button_style, self.stop.disabled = "primary", True
        names = ("Compare with base", "Input", "Settings")
        switches = [widgets.ToggleButton(description=name, layout=fit) for name in names]
        self.compare, self.with_input, self.with_settings = switches
        self.compare.value = self.conversation.compare
        self.compare.disabled = not hasattr(self.conversation.model, "peft_config")
        self.settings: dict[str, widgets.Widget] = {}
        for name, value in self.conversation.settings.items():
            self.settings[name] = widgets.IntText(value, description=name, **line)
            if name in SLIDERS:  # which would change a value beyond its ends in silence
                low, high = SLIDERS[name]
                ends = {"min": low, "max": max(high, value), "step": 0.05}
                self.settings[name] = widgets.FloatSlider(value, description=name, **ends, **line)
        self.play = widgets.Play(min=0, max=2**31 - 1, interval=int(TICK * 1000), layout={"display": "none"})

        self.field.on_msg(lambda *_: self._do(self._enter))  # the only one that it sends
        self.field.observe(lambda _: self._do(self._submit) if self._entered else None, "value")
        self.play.observe(lambda _: self._do(self._tick), "value")
        for button, action in zip(buttons, (self._submit, self._stop, self._clear, self._save)):
            button.on_click(lambda _, action=action: self._do(action))
        panel = widgets.VBox([*self.settings.values(), widgets.HBox([self.path, self.save])], layout=WIDE)
        for switch, part in ((self.with_input, self.input), (self.with_settings, panel)):
            widgets.dlink((switch, "value"), (part.layout, "display"), lambda on: "" if on else "none")

        # the front end keeps a reversed column at its end, so the newest message stays in sight without a script
        scroll = {"flex_flow": "column-reverse", "overflow": "auto", "height": "420px", **WIDE}
        self.messages = widgets.VBox(layout={"flex": "0 0 auto", "overflow": "visible"})
        self.status = widgets.HTML()
        entry = widgets.HBox([self.field, self.send, self.stop], layout=WIDE)
        row = widgets.HBox([*switches, self.clear], layout={"flex_flow": "row wrap", **WIDE})
        self.composer = widgets.VBox([self.input, entry, row, panel])
        said = widgets.Box([self.messages], layout=scroll)
        parts = [widgets.HTML(STYLE), said, self.status, self.composer, self.play]
        return widgets.VBox(parts, layout={"max_width": "1000px", **WIDE}).add_class("alpaca-box")

    def _enter(self) -> None:
        """Take Enter, which comes just before the text, or without it where the text came when the field lost focus."""
        self._entered = 2
        self._play()

    def _do(self, action: Callable[[], None]) -> None:
        """Do what the user wants, or say why it cannot be done."""
        with self._lock:
            try:
                action()
            except AlpacaError as error:
                self._say(str(error))

    def _submit(self) -> None:
        self._entered = 0
        text, input = self.field.value, self.input.value if self.with_input.value else ""
        if is_exit(text):
            self._stop(waiting=True)
            self.composer.layout.display = "none"
            self._say("The chat is closed: run its cell again to open it.")
        else:
            settings = {name: field.value for name, field in self.settings.items()}
            self.conversation.add(text, input, compare=self.compare.value, **settings)
            self._say("")
            threading.Thread(target=self._answer, daemon=True).start()
            self._play()
            self._show()
        self.field.value = ""

    def _answer(self) -> None:
        for exchange in list(self.conversation.exchanges):  # in order: what another thread answers is waited for
            for _ in self.conversation.answer(exchange):
                pass

    def _play(self) -> None:
        """Have the front end ask for news, anew if it has not asked lately: its page may have been reloaded."""
        if time.monotonic() - self._shown > 1:
            setattr(self.play, PLAYING, False)
        setattr(self.play, PLAYING, True)

    def _tick(self) -> None:
        self._show()
        if self._entered:
            self._entered -= 1
            if not self._entered:
                self._submit()
        elif self.stop.disabled:  # all is answered
            setattr(self.play, PLAYING, False)
            self._keep()

    def _show(self) -> None:
        """Bring the messages up to date, one widget each; what has not changed is not sent again."""
        with self._lock:
            self._shown = time.monotonic()
            exchanges, views = self.conversation.exchanges, self.messages.children
            self.stop.disabled = all(exchange.state == "done" for exchange in exchanges)  # first: what follows is final
            if len(views) < len(exchanges):
                views += tuple(widgets.HTML() for _ in exchanges[len(views) :])
                self.messages.children = views
            for exchange, view in zip(exchanges, views):
                view.value = as_html(exchange)

    def _say(self, sentence: str) -> None:
        self.status.value = f'<div class="alpaca-chat" role="status">{html.escape(sentence)}</div>' if sentence else ""

    def _keep(self) -> None:
        """Write the conversation into the cell's output as static text, which a saved notebook keeps."""
        if self._kept is not None:
            title = f"Transcript ({len(self.conversation.exchanges)}), as the saved notebook keeps it"
            said = f"<details><summary><small>{title}</small></summary>{self.conversation._repr_html_()}</details>"
            self._kept.update(HTML(said))

    def _stop(self, waiting: bool = False) -> None:
        """End the answer under way, and with `waiting` the others before they begin."""
        for exchange in self.conversation.exchanges:
            if waiting or exchange.state == "answering":
                exchange.stop.set()
        self._play()

    def _clear(self) -> None:
        self._stop(waiting=True)
        self.conversation.exchanges = []
        self.messages.children = ()
        self._say("")
        self._keep()

    def _save(self) -> None:
        self._say(f"Saved to {self.conversation.save(self.path.value)}")
