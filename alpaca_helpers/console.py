"""How a command line ends: one sentence where something is wrong, one line at Ctrl-C, quietly where nobody reads on."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable

from . import AlpacaError

KNOWN_WARNINGS = (  # of libraries, about what they do among themselves: category and beginning
    (FutureWarning, ".*is_gradient_checkpointing"),  # peft 0.21 asks transformers 5.23 for it by its old name
    (UserWarning, ".*pin_memory"),  # Trainer's default, without a GPU
)
KNOWN_LINES = (  # that transformers 5.23 logs: how each begins
    "`loss_type=None`",  # for each GPT-2, whose loss is found by the name of its class
    "mtime may not be reliable",  # of checkpoints saved within one tick of the file system's clock
)


def ignore_known_warnings() -> None:
    """Leave out the warnings of libraries that nobody here can mend: each by its category and message."""
    for category, message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name in ("modeling_utils", "trainer_utils"):
        logging.getLogger(f"transformers.{name}").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(KNOWN_LINES)


def run_command(main: Callable[[], None], interrupted: str = "Interrupted.") -> None:
    """Run `main` and exit: with 1 and the sentence of an AlpacaError, with 130 and `interrupted` after Ctrl-C."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # None where it was closed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "?" for what a terminal cannot spell in its encoding
    ignore_known_warnings()
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would tell of each task that Ctrl-C has cut
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except AlpacaError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if sys.stdout:  # what is still to be printed goes nowhere, or closing it at exit would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # who read it has gone: so be it
            sys.exit(f"{error.strerror}: {error.filename or 'the output cannot be written'}.")
