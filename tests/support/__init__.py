"""What the tests share: paths, refusals, prepared runs, tiny models, small rows, a Hub on loopback."""

import os
import socket
from pathlib import Path

import pytest

from alpaca_helpers import AlpacaError

PROJECT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("ALPACA_TEST_DATA", PROJECT.parent / "shared" / "data"))
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])}  # of a process
TRAIN_AND_DIE = Path(__file__).with_name("train_and_die.py")


def free_port() -> int:
    """Return a port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refusal(call, *given, **named) -> str:
    """Return the sentence, which is to be one line, of the AlpacaError of a call that is to fail."""
    with pytest.raises(AlpacaError) as refused:
        call(*given, **named)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Return what is in a folder, also deeper: the files' bytes, None for others."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
