"""The chat in a terminal: `python -m alpaca_helpers.chat --help`."""

from .terminal import main

if __name__ == "__main__":
    main()
