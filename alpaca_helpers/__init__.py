"""Helpers of the notebook series: prompt, data, LoRA, training, generation and evaluation of causal language models."""

import os
from pathlib import Path

__version__ = "0.2.0"
PACKAGE = Path(__file__).resolve().parent


class AlpacaError(Exception):
    """One sentence with what is wrong, where, and what to do."""


def project_folder() -> Path:
    """Return the checkout that the working folder lies in (the folder of `notebooks/`), else the working folder."""
    here, first = Path.cwd(), "notebooks/01_base_model.ipynb"
    return next((folder for folder in (here, *here.parents) if (folder / first).is_file()), here)


def locate(path: str, typed: bool = False) -> Path:
    """Return the absolute path of a file or folder, there or not; AlpacaError where no disk takes so long a name.

    A profile's and a manifest's is looked for from where the package lies, the project's folder, the working folder;
    one that somebody `typed` in the opposite order.
    """
    wanted = os.path.expanduser(path)
    if any(len(part.encode(errors="replace")) > 255 for part in Path(wanted).parts):
        raise AlpacaError(f"{path:.60}… is too long for a file's name: check the path.")
    places = [PACKAGE.parent / wanted, project_folder() / wanted, Path.cwd() / wanted]
    return next((place for place in places[:: -1 if typed else 1] if os.path.lexists(place)), places[1])


def portable(path: str) -> str:
    """Return a path as a manifest has it: of what is beside the package as seen from there, any other as it is."""
    place = Path(path)
    return place.relative_to(PACKAGE.parent).as_posix() if place.is_relative_to(PACKAGE.parent) else path
