"""What the tests share: paths, prepared runs, tiny models, small rows, a Hub on loopback."""

import os
import socket
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("ALPACA_TEST_DATA", PROJECT.parent / "shared" / "data"))
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])}  # of a process
TRAIN_AND_DIE = Path(__file__).with_name("train_and_die.py")


def free_port() -> int:
    """Return a port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
