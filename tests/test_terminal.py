"""The chat in a terminal and how every command line ends: narrow encodings, full and closed outputs, Ctrl-C, errors."""

import ast
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

import papermill
import pexpect
import pytest
from support import PROJECT
from support.runs import finished_run

from alpaca_helpers import AlpacaError, series
from alpaca_helpers.chat import conversation, terminal
from alpaca_helpers.chat.conversation import DEFAULTS, Conversation, Reply
from alpaca_helpers.console import run_command
from alpaca_helpers.generation import Answer

FULL = Path("/dev/full")


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "run")


class Stream(io.TextIOWrapper):
    """A stream as the system gives it to Python; `pieces` are what was written to it."""

    def __init__(self, content: bytes = b"", encoding: str = "utf-8"):
        super().__init__(tempfile.TemporaryFile(), encoding=encoding)
        self.buffer.write(content)
        self.buffer.seek(0)
        self.pieces = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)

    def content(self) -> bytes:
        self.flush()
        return os.pread(self.fileno(), 1 << 20, 0)


@pytest.fixture
def command(monkeypatch):
    """Run a main as a command line with these options and streams; return its exit, standard output and errors."""

    def run(main, *options, typed=b"", encoding="utf-8", interrupted="Interrupted."):
        streams = {"stdin": Stream(typed, encoding), "stdout": Stream(encoding=encoding), "stderr": Stream()}
        code = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["chat", *map(str, options)])
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            try:
                run_command(main, interrupted)
            except SystemExit as left:
                code = left.code
        return code, streams["stdout"], streams["stderr"].content().decode()

    return run


# How a command line ends


def test_an_end_is_a_status_and_a_line_in_any_encoding(command):
    for error, code, said in (
        (AlpacaError("The bread is burnt."), "The bread is burnt.", ""),  # Python prints it and exits with 1
        (FileNotFoundError(2, "No such file", "bread"), "[Errno 2] No such file: 'bread'", ""),
        (KeyboardInterrupt(), 130, "\nInterrupted.\n"),
    ):
        assert command(Mock(side_effect=error))[::2] == (code, said)
    for encoding, arrow in (("ascii", b"?"), ("cp1252", b"?"), ("utf-8", "→".encode())):
        left, out, err = command(lambda: print("7 → 96 %"), encoding=encoding)
        assert (left, out.content().split(), err) == (0, [b"7", arrow, b"96", b"%"], "")
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        command(lambda: 1 / 0)


def test_closed_streams_a_reader_that_has_gone_and_a_full_output_do_no_harm(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    run_command(lambda: (print("facts"), terminal.talk(None)))
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:  # closed as at exit, without an error
        monkeypatch.setattr(sys, "stdout", gone)
        run_command(lambda: print("facts"))
    if FULL.exists():  # a disk that is always full, where the system has one
        with FULL.open("w") as full, pytest.raises(SystemExit, match="No space left on device"):
            monkeypatch.setattr(sys, "stdout", full)
            run_command(lambda: print("facts"))


def test_ctrl_c_in_a_cell_of_the_series_is_one_line(command, monkeypatch, tmp_path):
    """The kernel gets the interrupt too, and papermill makes of it an error of the cell."""
    error = papermill.PapermillExecutionError(1, 1, "", "KeyboardInterrupt", "", [])
    monkeypatch.setattr(papermill, "execute_notebook", Mock(side_effect=error))
    left, _, err = command(series.main, "--profile", "pocket", "--run", tmp_path / "run", interrupted="So be it.")
    assert (left, err) == (130, "\nSo be it.\n")


# The chat


def test_lines_are_answered_bit_by_bit_whatever_their_bytes_until_exit_or_the_end(run, command):
    options = [terminal.main, "--run", run, "--max-new-tokens", 12]
    left, out, err = command(*options, typed=b"\n\xff\xfe\x1b[31m\n Exit \nnever read\n")
    said = "".join(out.pieces)
    assert left == 0 and err.startswith("Loading ") and "Traceback" not in err
    assert "The message is blank" in said and said.count(" · 12 tokens · ") == 1 and len(out.pieces) > 20
    left, out, _ = command(*options, "--compare", typed="Hé\nHi".encode())
    said = "".join(out.pieces)
    assert left == 0 and [said.count(part) for part in (" 12 tokens ", "base: ", "\ntuned: ")] == [4, 2, 2]


def test_once_prints_the_answer_alone(run, command):
    options = ["--run", run, "--once", "What is it?", "--input", "a cat", "--temperature", 0, "--max-new-tokens", 9]
    answer, both = (command(terminal.main, *options, *more)[1].content().decode() for more in ([], ["--compare"]))
    assert answer.strip() and "tokens" not in answer and "tuned" not in answer
    assert both.startswith("base: ") and both.endswith(f"\ntuned: {answer}")


def test_what_is_wrong_is_one_sentence_and_makes_nothing(run, command, tmp_path):
    for options, sentence in (
        (["--once", " "], "The message is blank"),
        (["--once", "Hi", "--temperature", "-1"], "temperature is -1.0"),
        (["--once", "Hi", "--max-new-tokens", "256"], "max_new_tokens is 256"),
        (["--input", "a cat"], "give that by --once"),
        (["--run", tmp_path / "missing"], "03_lora_finetuning"),
    ):
        left, out, _ = command(terminal.main, "--run", run, *options)
        assert sentence in left and "\n" not in left and out.content() == b""
    assert not (tmp_path / "missing").exists()
    left, out, _ = command(terminal.main, "--help")
    options = [f"--{name.replace('_', '-')} " for name in (*DEFAULTS, "compare", "once", "input")]
    assert left == 0 and all(option in out.content().decode() for option in options)


def test_no_escape_sequence_of_a_message_or_an_answer_reaches_the_terminal(capsys, tiny_model, pocket_tokenizer):
    talk = Conversation(tiny_model, pocket_tokenizer)
    exchange = talk.add("\x1b[2J")
    evil = Reply("base", Answer("\x1b]0;owned\x07 \x9b31m red\r over \u202e rtl", [], False, 0))
    talk.answer = lambda given: iter([setattr(given, "replies", (evil, evil))])
    exchange.error = "no \x1b[2J answer"
    with pytest.raises(AlpacaError) as raised:
        terminal.print_answer(talk, exchange)
    assert not set(capsys.readouterr().out + str(raised.value)) & set("\x1b\x07\x9b\r\u202e")


def test_ctrl_c_ends_the_answer_and_on_an_empty_line_nothing(tiny_model, pocket_tokenizer, monkeypatch, capsys):
    real, before = conversation.stream, signal.getsignal(signal.SIGINT)

    def stream(*given, **settings):
        for number, answers in enumerate(real(*given, **settings)):
            if number == 3:
                signal.raise_signal(signal.SIGINT)
            yield answers

    monkeypatch.setattr(conversation, "stream", stream)
    monkeypatch.setattr("builtins.input", Mock(side_effect=["Tell me all", KeyboardInterrupt, "exit"]))
    talk = Conversation(tiny_model, pocket_tokenizer, max_new_tokens=50)
    terminal.talk(talk)
    replies = talk.exchanges[0].replies
    assert all(reply.ending == "stopped" and reply.answer.tokens < 7 for reply in replies)
    said = capsys.readouterr().out
    assert said.count("[stopped · ") == 2 and "Type exit to leave." in said
    assert signal.getsignal(signal.SIGINT) is before


# In earnest


@pytest.mark.integration
def test_streams_stops_at_ctrl_c_and_leaves_at_exit(run, interrupts):
    options = ["-m", "alpaca_helpers.chat", "--run", str(run), "--max-new-tokens", "110"]
    chat = pexpect.spawn(sys.executable, options, cwd=PROJECT, encoding="utf-8", timeout=300, dimensions=(24, 200))
    try:
        chat.expect_exact("Instruction: ")
        chat.sendline("What is it?")  # its answer does not end by itself
        chat.expect_exact("What is it?\r\n")
        chat.expect(r"\S\S+")  # it has begun
        chat.sendintr()
        chat.expect(r"\[(stopped|cut at the limit) · \d+ tokens? ")  # the latter where we were too slow
        for _ in range(2):  # on an empty line it ends nothing
            chat.expect_exact("Instruction: ")
            chat.sendintr()
            chat.expect_exact("Type exit to leave.")
        chat.sendline(" Exit ")
        chat.expect(pexpect.EOF)
        chat.close()
        assert chat.exitstatus == 0
    finally:
        chat.close(force=True)


IN_A_PIPE = """
import runpy, sys
import alpaca_helpers.chat
early = {"torch"} & set(sys.modules)
runpy.run_module("alpaca_helpers.chat", run_name="__main__")
print(early | {"alpaca_helpers.chat.rendering", "ipywidgets", "IPython"} & set(sys.modules), file=sys.stderr)
"""


@pytest.mark.integration
def test_a_pipe_whose_reader_has_gone_ends_quietly_and_nothing_of_a_notebook_was_loaded(run):
    read, write = os.pipe()
    os.close(read)
    options = [sys.executable, "-c", IN_A_PIPE, "--run", run, "--once", "Hi"]
    done = subprocess.run(options, cwd=PROJECT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(write)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "{'alpaca_helpers.chat.rendering'}", done.stderr
    assert done.stderr.startswith("Loading ") and "Error" not in done.stderr and "Traceback" not in done.stderr


def test_nothing_else_in_the_package_imports_the_chat():
    package = PROJECT / "alpaca_helpers"
    for path in set(package.rglob("*.py")) - set((package / "chat").iterdir()):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "chat" not in ast.unparse(node).replace(",", " ").replace(".", " ").split(), path


@pytest.mark.nightly
def test_ctrl_c_in_the_real_series_is_one_line_and_the_run_goes_on(tmp_path, interrupts):
    """A terminal sends the interrupt to the whole group: to the series and to the kernel that it has started."""
    command = [sys.executable, "-m", "alpaca_helpers.series", "--profile", "pocket", "--run", f"{tmp_path}/run"]
    command += ["-p", "num_train_epochs", "1", "-p", "max_heldout_rows", "20"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": PROJECT, "text": True}
    started = subprocess.Popen(command, start_new_session=True, **pipes)
    while not any('"running"' in path.read_text() for path in (tmp_path / "run").glob("02*.ipynb")):
        assert started.poll() is None
        time.sleep(0.1)
    os.killpg(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=600)
    assert started.returncode == 130
    lines = [line for line in err.splitlines() if line.strip() and "Executing:" not in line]
    assert lines == ["Interrupted: what is done is kept, and the same command goes on from there."]
    again = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "[1/4] 01_base_model: unchanged" in again.stdout and "[2/4] 02_dataset_and_tokenizer\n" in again.stdout
