"""Notebook 04's chat box in a real JupyterLab and a real Chromium: pytest tests/test_browser.py

What it looked like is left in build/browser/*.png.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import sync_playwright
from support import PROJECT, free_port

from alpaca_helpers.cells import NOTEBOOKS
from alpaca_helpers.series import run_series

pytest.importorskip("ipywidgets", "8", reason="JupyterLab 4 has no front end for ipywidgets 7, and Colab's is its own")
pytestmark = pytest.mark.nightly

FOLDER = PROJECT / "build" / "browser"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
HOSTILE = '<img src=x onerror="window.harmed = 1"> <script>window.harmed = 1</script> $x^2$ ![x](/x.png) שלום 👋'
SETTINGS = {  # of JupyterLab, so that nothing stands before the notebook
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "apputils-extension/themes": {"theme": "JupyterLab Light"},
}
# What a user sees of each side's last answer, noted at every change of the page
WATCH = """() => { window.seen = []; new MutationObserver(() => {
  const texts = side => [...document.querySelectorAll('.jupyter-widgets .' + side + ' .bubble')].map(e => e.textContent)
  const note = [texts('base').pop() ?? '', texts('tuned').pop() ?? '']
  window.seen.push(note.map(text => text.length))
}).observe(document.body, {childList: true, subtree: true, characterData: true}) }"""


@pytest.fixture(scope="module")
def notebook() -> str:
    """The path, from `FOLDER`, of a copy of notebook 04 beside a run that notebooks 02 and 03 have just made."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    run = {"profile": "pocket", "run": str(FOLDER / "run")}
    run_series(run | {"max_train_rows": 200, "num_train_epochs": 3}, NOTEBOOKS[1:3])
    parameterized = parameterize_notebook(load_notebook_node(str(NOTEBOOKS[3])), run | {"max_heldout_rows": 8})
    shown = next(number for number, cell in enumerate(parameterized.cells) if cell.source == "box")
    slow = "import time\n\nmodel.register_forward_hook(lambda *_: time.sleep(0.02))"  # or an answer ends before a click
    parameterized.cells.insert(shown, new_code_cell(slow))
    nbformat.write(parameterized, FOLDER / NOTEBOOKS[3].name)
    return NOTEBOOKS[3].name


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab of its own on loopback, with the settings and the data folders of nobody."""
    home = tmp_path_factory.mktemp("lab")
    for name, value in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    folders = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{kind}_DIR": str(home / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={FOLDER}", "--LabApp.expose_app_in_browser=True"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | folders, stdout=log, stderr=log)
    try:
        for _ in range(1200):
            assert server.poll() is None, (home / "log").read_text()
            with suppress(OSError):
                urllib.request.urlopen(f"{address}/api", timeout=60)
                break
            time.sleep(0.25)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def page(tmp_path):
    if not Path(CHROMIUM).exists():  # CI has to have it
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing(f"no Chromium at {CHROMIUM}: apt-get install chromium chromium-driver")
    options = {"executable_path": CHROMIUM, "args": FLAGS, "viewport": {"width": 1100, "height": 900}}
    with sync_playwright() as started:
        browser = started.chromium.launch_persistent_context(tmp_path / "profile", **options)
        browser.set_default_timeout(300_000)
        yield browser.pages[0]
        browser.close()


def test_a_conversation_in_notebook_04(page, notebook, lab):
    box = page.locator(".alpaca-box")
    field = box.get_by_placeholder("Type an instruction")
    notes = box.locator(".reply small")

    def shot(name):
        box.scroll_into_view_if_needed()
        page.screenshot(path=FOLDER / f"{name}.png")

    def button(name):
        return box.get_by_role("button", name=name, exact=True)

    def say(text):
        field.fill(text)
        field.press("Enter")

    def answered(number):
        """Wait for the number of exchanges, all of them ended."""
        page.wait_for_function(
            """number => { const notes = [...document.querySelectorAll('.alpaca-box .replies')]
            return notes.length === number && !document.querySelector('.alpaca-box .going') }""",
            arg=number,
        )

    def set_up(**values):
        """Type settings into their fields, a slider's into the number beside it."""
        button("Settings").click()
        for name, value in values.items():
            slider = f".widget-slider:has-text('{name}') .widget-readout"
            typed = box.locator(f".widget-text:has-text('{name}') input, {slider}")
            typed.fill(str(value))
            typed.press("Enter")
        button("Settings").click()

    # it opens, runs, and shows the scripted conversation
    page.goto(f"{lab}/doc/tree/{notebook}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.locator(".jp-NotebookPanel-toolbar .jp-KernelName >> text=Python 3").wait_for()
    page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-prompt").first.click()
    page.keyboard.press("Control+a")
    page.keyboard.press("Control+Enter")
    field.wait_for()
    scripted = box.locator(".replies").count()
    shot("light")

    # both answers stream after Enter
    page.evaluate(WATCH)
    say("Tell me a long story about the capital of France and its river.")
    answered(scripted + 1)
    for side in (0, 1):
        lengths = [note[side] for note in page.evaluate("window.seen")]
        assert len(set(lengths)) > 2, f"{('base', 'tuned')[side]} did not stream: {lengths}"
    assert field.input_value() == ""

    # stop ends the answer
    set_up(temperature=0, max_new_tokens=200)  # greedily, the base goes round in circles
    say("What is the weather like?")
    box.locator(".going").first.wait_for()
    page.wait_for_function("[...document.querySelectorAll('.alpaca-box .going')].some(bubble => bubble.textContent)")
    page.screenshot(path=FOLDER / "midstream.png")
    button("Stop").click()
    answered(scripted + 2)
    assert any(note.startswith("stopped · ") for note in notes.all_inner_texts()[-2:])

    # markup of a user stays text, in the box and in the page's static copy
    set_up(max_new_tokens=20)
    say(HOSTILE)
    answered(scripted + 3)
    assert box.locator(".you .bubble").last.inner_text() == HOSTILE
    page.wait_for_timeout(500)
    assert page.evaluate("window.harmed") is None
    assert box.locator("img, script, a, .MathJax, mjx-container").count() == 0

    # what a keyboard cannot type: half an emoji, as a script of the page would send it
    changed = "field.dispatchEvent(new Event('change', {bubbles: true}))"
    field.evaluate("field => { field.value = 'half \\ud83d'; " + changed + " }")
    button("Send").click()
    answered(scripted + 4)
    assert "half" in box.locator(".you .bubble").last.inner_text()

    # it is saved under the name typed
    button("Settings").click()
    path = box.locator(".widget-text:has-text('save as') input")
    path.fill("talk.md")
    path.press("Tab")
    button("Save").click()
    box.get_by_text("Saved to").wait_for()
    assert HOSTILE in (FOLDER / "talk.md").read_text(encoding="utf-8")
    shot("settings")
    button("Settings").click()

    # a refusal in sight, then narrow and dark
    field.press("Enter")
    box.get_by_text("The message is blank").wait_for()
    shot("refused")
    page.set_viewport_size({"width": 460, "height": 900})
    page.wait_for_timeout(500)
    shot("narrow")
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth + 1")
    page.set_viewport_size({"width": 1100, "height": 900})
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    shot("dark")

    # clear, one more, exit
    button("Clear").click()
    answered(0)
    say("What is the capital of Portugal?")
    answered(1)
    say("exit")
    box.get_by_text("The chat is closed").wait_for()
    assert not field.is_visible()
    shot("closed")

    # the saved notebook has what was said, as text
    saved = FOLDER / notebook
    for _ in range(100):
        page.keyboard.press("Control+s")
        if "What is the capital of Portugal?" in saved.read_text(encoding="utf-8"):
            break
        time.sleep(0.2)
    cells = nbformat.read(saved, as_version=4).cells
    outputs = next(cell.outputs for cell in cells if cell.source == "box")
    kept = "".join(output.data.get("text/html", "") for output in outputs if "data" in output)
    assert "What is the capital of Portugal?" in kept
