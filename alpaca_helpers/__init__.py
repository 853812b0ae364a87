"""Helpers of the notebook series: prompt, data, LoRA, training, generation and evaluation of causal language models."""

import os
from pathlib import Path

__version__ = "0.2.0"
PACKAGE = Path(__file__).resolve().parent


class AlpacaError(Exception):
    """One sentence with what is wrong, where, and what to do; `code` names the fault for programs: `no-artifact`, …"""

    def __init__(self, message: str, code: str = ""):
        super().__init__(message)
        self.code = code


def project_folder() -> Path:
    """Return the checkout that the working folder lies in (the folder of `notebooks/`), else the working folder."""
    here = Path.cwd()
    checkouts = (folder for folder in (here, *here.parents) if (folder / "notebooks" / "01_base_model.ipynb").is_file())
    return next(checkouts, here)


def locate(path: str) -> Path:
    """Return where a file or folder is: seen from the working folder, the project's, or where the package lies."""
    wanted = Path(path).expanduser()
    places = [wanted, project_folder() / wanted, PACKAGE.parent / wanted]
    return next((place for place in places if place.exists()), places[1])


def portable(path: str) -> str:
    """Return an absolute path as seen from where the package lies, fit for a manifest; any other text as it is."""
    try:
        return os.path.relpath(path, PACKAGE.parent) if os.path.isabs(path) else path
    except ValueError:  # on another drive of Windows
        return path
