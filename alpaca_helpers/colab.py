"""What a notebook's first cell does on Colab, where only the `.ipynb` was opened; elsewhere it does nothing."""

import importlib
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import PACKAGE, AlpacaError

REQUIREMENTS = PACKAGE.parent / "requirements.txt"
# torch there is built for its GPU; the others run notebooks, which Colab itself does, and would replace its own parts
LEFT_ALONE = {"torch", "jupyterlab", "papermill", "nbval"}
DRIVE = Path("/content/drive")


def prepare(run: str = "") -> None:
    """Make Colab ready: remove torchao, install what `requirements.txt` names and Colab lacks, mount Drive for `run`.

    torchao comes with Colab, older than peft accepts, and peft then refuses to attach an adapter; nothing here uses it.

    Args:
        run: the run's name or folder; one under /content/drive is kept on Drive, which asks for permission once.

    Raises AlpacaError if pip or Drive fails.
    """
    if "COLAB_RELEASE_TAG" not in os.environ:
        return
    if _installed("torchao"):
        _pip("uninstall", "--yes", "torchao")
    if missing := missing_requirements():
        print("Installing", *missing, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            keep = Path(folder, "keep.txt")
            keep.write_text(f"torch=={_installed('torch')}\n")
            _pip("install", "--quiet", "--constraint", str(keep), *missing)
    importlib.invalidate_caches()
    if Path(run).is_relative_to(DRIVE) and not (DRIVE / "MyDrive").is_dir():
        _mount_drive()


def missing_requirements() -> list[str]:
    """Return the lines of `requirements.txt` that are not met here, `LEFT_ALONE` apart."""
    from packaging.requirements import Requirement

    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    wanted = [Requirement(line) for line in lines if line]
    return [
        str(one)
        for one in wanted
        if one.name not in LEFT_ALONE and not one.specifier.contains(_installed(one.name) or "0", prereleases=True)
    ]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise AlpacaError(f"pip {' '.join(arguments)} failed ({reason}): restart the runtime and try again.")


def _mount_drive() -> None:
    try:
        from google.colab import drive

        drive.mount(str(DRIVE))
    except Exception as error:  # whatever Colab raises where nobody can be asked, as in a batch
        raise AlpacaError(f"Drive is not mounted at {DRIVE} ({error}): mount it in an open Colab notebook.") from error
