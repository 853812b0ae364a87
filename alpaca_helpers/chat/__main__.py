"""The chat in a terminal: `python -m alpaca_helpers.chat --help`."""

from ..console import run_command


def main() -> None:
    """Run the command line."""
    from .terminal import main  # takes seconds, in which Ctrl-C is one line too

    main()


if __name__ == "__main__":
    run_command(main)
