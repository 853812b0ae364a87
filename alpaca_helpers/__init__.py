"""Helpers of the notebook series: prompt, data, LoRA, training, generation and evaluation for GPT-2."""

import os
from pathlib import Path

__version__ = "0.1.0"
PROJECT = Path(__file__).resolve().parent.parent


class AlpacaError(Exception):
    """Something a user can put right: one sentence with what is wrong, where, and what to do."""


def locate(path: str) -> Path:
    """Return where a file or folder is: seen from the working folder, else from the project's."""
    found = Path(path).expanduser()
    return found if found.exists() else PROJECT / found


def portable(path: str) -> str:
    """Return an absolute path as seen from the project, and any other text as it is: fit for a manifest."""
    return os.path.relpath(path, PROJECT) if os.path.isabs(path) else path
