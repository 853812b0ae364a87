"""The chat in a terminal: `python -m alpaca_helpers.chat --help`."""

from importlib import import_module

from ..console import run_command


def command() -> None:
    """Run the command line and exit; the import takes seconds, in which Ctrl-C is one line too."""
    run_command(lambda: import_module("alpaca_helpers.chat.terminal").main())


if __name__ == "__main__":
    command()
