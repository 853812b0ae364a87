"""The package as a stranger installs it: a copy of the working tree, and virtual environments without the package."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from support import PROJECT


def run(command: list, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a command without this process's PYTHONPATH, and offline."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env = kept | {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def copy_project(to: Path) -> Path:
    """Return a copy of the working tree, without what is not the project's, since a build leaves its folders behind."""
    unwanted = (".*", "build", "runs", "__pycache__", "*.egg-info")
    return Path(shutil.copytree(PROJECT, to, ignore=shutil.ignore_patterns(*unwanted)))


def fresh_python(folder: Path) -> tuple[Path, Path]:
    """Return the Python and the site-packages of a virtual environment that sees this one's libraries alone."""
    run([sys.executable, "-m", "venv", "--without-pip", folder / "fresh"], folder)
    (site,) = (folder / "fresh").glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))  # the other packages; its .pth files are not read
    return folder / "fresh" / "bin" / "python", site
