"""The chat in a terminal: `python -m alpaca_helpers.chat --help`."""

from ..console import run_command


def command() -> None:
    """Run the command line and exit."""

    def main() -> None:
        from .terminal import main  # takes seconds, in which Ctrl-C is one line too

        main()

    run_command(main)


if __name__ == "__main__":
    command()
