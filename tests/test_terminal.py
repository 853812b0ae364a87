"""The chat in a real pseudo-terminal, on a run made by hand: pytest tests/test_terminal.py"""

import ast
import os
import re
import subprocess
import sys

import pexpect
import pytest
from support import PROJECT
from support.runs import record_adapter, save_adapter

from alpaca_helpers import AlpacaError
from alpaca_helpers.chat.conversation import Conversation, Reply
from alpaca_helpers.chat.terminal import print_answer

pytestmark = pytest.mark.integration

IMPORTS = (ast.Import, ast.ImportFrom)
CHAT = ["-m", "alpaca_helpers.chat", "--run"]


@pytest.fixture
def run(tmp_path, tiny_model, pocket_tokenizer):
    """The folder of a finished run of the tiny model."""
    folder = tmp_path / "run"
    tiny_model.active_peft_config.base_model_name_or_path = str(tmp_path / "model")
    save_adapter(tiny_model, pocket_tokenizer, folder / "adapter")
    tiny_model.unload().save_pretrained(tmp_path / "model")
    pocket_tokenizer.save_pretrained(tmp_path / "model")
    record_adapter(folder, model=str(tmp_path / "model"))
    return folder


@pytest.fixture
def terminal(run):
    opened = []

    def open_terminal(*options):
        chat = pexpect.spawn(
            sys.executable, [*CHAT, str(run), *options], cwd=PROJECT, encoding="utf-8", timeout=60, dimensions=(24, 200)
        )
        opened.append(chat)
        return chat

    yield open_terminal
    for chat in opened:
        chat.close(force=True)


def once(run, *options, **more):
    return subprocess.run(
        [sys.executable, *CHAT, str(run), *options], cwd=PROJECT, capture_output=True, text=True, timeout=120, **more
    )


def test_streams_stops_at_ctrl_c_and_leaves_at_exit(terminal):
    chat = terminal("--max-new-tokens", "110")
    chat.expect_exact("Instruction: ")
    chat.sendline("Tell me all")
    chat.expect_exact("Tell me all\r\n")
    pieces = []
    while "tokens/s]" not in "".join(pieces):
        pieces.append(chat.read_nonblocking(4096, timeout=60))
    assert len(pieces) > 10  # it came bit by bit
    assert "[cut at the limit · 110 tokens · " in "".join(pieces)
    chat.sendline("Tell me more")
    chat.expect_exact("Tell me more\r\n")
    chat.expect(r"\S\S+")  # it has begun
    chat.sendintr()
    chat.expect(r"\[stopped · (\d+) tokens?")
    assert 0 < int(chat.match[1]) < 110
    chat.expect_exact("Instruction: ")
    chat.sendintr()  # on an empty line it ends nothing either
    chat.expect_exact("Type exit to leave.")
    chat.expect_exact("Instruction: ")
    chat.sendline("")
    chat.expect_exact("The message is blank")
    chat.sendline(" Exit ")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


def test_the_end_of_input_leaves_too(terminal):
    chat = terminal("--max-new-tokens", "3", "--compare")
    chat.expect_exact("Instruction: ")
    chat.sendline("Hi")
    chat.expect(r"base: .*\[.*3 tokens.*tuned: .*\[.*3 tokens")
    chat.expect_exact("Instruction: ")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


def test_no_escape_sequence_of_a_message_or_an_answer_reaches_the_terminal(capsys, tiny_model, pocket_tokenizer):
    talk = Conversation(tiny_model, pocket_tokenizer)
    exchange = talk.add("\x1b[2J")
    evil = Reply("base", "\x1b]0;owned\x07 \x9b31m red\r over \u202e rtl")
    talk.answer = lambda given: iter([setattr(given, "replies", (evil, evil))])
    exchange.error = "no \x1b[2J answer"
    with pytest.raises(AlpacaError) as raised:
        print_answer(talk, exchange)
    assert raised.value.code == "no-answer"
    assert not set(capsys.readouterr().out + str(raised.value)) & set("\x1b\x07\x9b\r\u202e")


def test_once_prints_the_answer_alone(run):
    first = once(run, "--once", "What is it?", "--input", "a cat", "--temperature", "0", "--max-new-tokens", "9")
    assert first.returncode == 0 and first.stderr.startswith("Loading ") and len(first.stdout.strip()) > 0
    assert "tokens" not in first.stdout and "tuned" not in first.stdout
    both = once(run, "--once", "What is it?", "--input", "a cat", "--temperature=0", "--max-new-tokens=9", "--compare")
    assert both.stdout.startswith("base: ") and f"tuned: {first.stdout}" in both.stdout


def test_lines_from_a_pipe_are_answered_whatever_their_bytes(run):
    chat = subprocess.run(
        [sys.executable, *CHAT, str(run), "--max-new-tokens", "2"],
        cwd=PROJECT,
        input="Hé\n".encode() + b"\xff\xfe\x1b[31m\n" + b"quit\nnever read\n",
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONIOENCODING": "ascii:surrogateescape"},
    )
    assert chat.returncode == 0 and chat.stdout.count(b" 2 tokens ") == 2


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--once", " "], "The message is blank"),
        (["--once", "Hi", "--temperature", "-1"], "temperature is -1.0: choose"),
        (["--once", "Hi", "--max-new-tokens", "128"], "max_new_tokens is 128: choose"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_a_status(run, options, sentence):
    failed = once(run, *options)
    assert failed.returncode == 1 and sentence in failed.stderr.splitlines()[-1] and "Traceback" not in failed.stderr


def test_a_run_that_is_not_there_is_named_and_not_made(tmp_path):
    failed = once(tmp_path / "missing", "--once", "Hi")
    assert failed.returncode == 1 and "run notebook 03_lora_finetuning first" in failed.stderr
    assert "Traceback" not in failed.stderr and not (tmp_path / "missing").exists()


LOADED = """
import runpy, sys
import alpaca_helpers.chat
assert "torch" not in sys.modules
import alpaca_helpers.chat.conversation, alpaca_helpers.chat.terminal
sys.argv = ["chat", "--help"]
try:
    runpy.run_module("alpaca_helpers.chat", run_name="__main__")
except SystemExit as left:
    assert not left.code
print(sorted({"alpaca_helpers.chat.rendering", "ipywidgets", "IPython"} & set(sys.modules)))
"""


def test_the_terminal_loads_neither_ipywidgets_nor_ipython():
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--compare" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "['alpaca_helpers.chat.rendering']"


def test_nothing_else_in_the_package_imports_the_chat():
    package = PROJECT / "alpaca_helpers"
    for path in package.rglob("*.py"):
        if not path.is_relative_to(package / "chat"):
            imports = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, IMPORTS)]
            assert "chat" not in re.findall(r"\w+", " ".join(map(ast.unparse, imports))), path


def test_help_names_every_option():
    shown = once("none", "--help").stdout
    assert all(option in shown for option in ("--compare", "--once", "--input", "--temperature", "--top-k", "--seed"))
