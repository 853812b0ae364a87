"""How a command line ends: one sentence where something is wrong, one line at Ctrl-C, quietly where nobody reads on."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable

from . import AlpacaError


def ignore_known_warnings() -> None:
    """Leave out the warnings of libraries that nobody here can mend: each by its category and message."""
    # peft 0.21 asks transformers 5.23 for it by its old name; Trainer's default, without a GPU
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory", category=UserWarning)
    logging.getLogger("transformers.modeling_utils").addFilter(_is_news)  # once, however often it is called


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("`loss_type=None`")  # of each GPT-2, by the name of its class


def run_command(main: Callable[[], None], interrupted: str = "Interrupted.") -> None:
    """Run `main` and exit: with 1 and the sentence of an AlpacaError, with 130 and `interrupted` after Ctrl-C."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # None where it was closed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "?" for what a terminal cannot spell in its encoding
    ignore_known_warnings()
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would tell of each task that Ctrl-C has cut
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except (AlpacaError, OSError) as error:
        if isinstance(error, OSError) and sys.stdout:  # or closing it at exit would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader has gone, such as `head`
            sys.exit(str(error))
