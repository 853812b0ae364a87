"""How a command line ends: one sentence where something is wrong, one line at Ctrl-C, quietly where nobody reads on."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable

from . import AlpacaError


def run_command(main: Callable[[], None], interrupted: str = "Interrupted.") -> None:
    """Run `main` and exit: with 1 and the sentence of an AlpacaError, with 130 and `interrupted` after Ctrl-C."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # None where it was closed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "?" for what a terminal cannot spell in its encoding
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft 0.21 asks for it by its old name
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
