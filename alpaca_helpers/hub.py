"""Files on the Hub: fetched once into its cache, announced beforehand, and one clear sentence where that cannot be."""

import threading
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from . import AlpacaError

PATIENCE = 4.0  # seconds for the Hub's first answer; its own library would try for 47 s, file after file
WAITS = (1, 2, 4, 8)  # seconds between tries while the Hub answers that it is busy
OFFLINE_WAY = "or run the model that comes with the project: PROFILE=pocket (in a notebook, profile = 'pocket')"


def fetch(name: str, revision: str | None, kind: str, wanted: Sequence[str]) -> Path:
    """Return the cache's folder of `name` on the Hub after downloading each file of a `wanted` pattern not yet there.

    What is to come and its size are printed first. Small files come first, the weights last.

    Args:
        revision: the commit; None is the newest.
        kind: `model` or `dataset`.

    Raises AlpacaError within 5 s if the Hub cannot be reached; later, if it breaks off.
    """

    def because(error: Exception) -> AlpacaError:
        return AlpacaError(_sentence(name, revision, kind, error))

    try:
        info = _while_busy(lambda: _in_time(lambda: _info(name, revision, kind)))
    except Exception as error:  # the library's exceptions differ from release to release
        raise because(error) from error
    files = [file for file in info.siblings if any(fnmatch(file.rfilename, pattern) for pattern in wanted)]
    if not files:
        raise AlpacaError(f"{name} on the Hub has no {' or '.join(wanted)}: choose another {kind}.")
    files.sort(key=lambda file: file.size or 0)
    folder = cached_folder(name, info.sha, kind)
    if missing := [file for file in files if not (folder and (folder / file.rfilename).exists())]:
        size, names = sum(file.size or 0 for file in missing), ", ".join(file.rfilename for file in missing)
        print(f"Downloading {name} from the Hub, {readable_size(size)}, once: {names}", flush=True)
    try:
        for file in files:
            path = _while_busy(lambda: hf_hub_download(name, file.rfilename, repo_type=kind, revision=revision))  # noqa: B023
    except Exception as error:
        raise because(error) from error
    return Path(path).parents[file.rfilename.count("/")]


def cached_folder(name: str, revision: str | None, kind: str) -> Path | None:
    """Return the cache's folder of `name`, whole or not, without asking the Hub; None if there is none.

    The layout is the Hub library's: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    repository = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")
    branch = repository / "refs" / (revision or "main")
    commit = branch.read_text().strip() if branch.is_file() else revision
    folder = repository / "snapshots" / str(commit)
    return folder if folder.is_dir() else None


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, without its full stop; the error's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def readable_size(size: float) -> str:
    """Return a number of bytes in MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _info(name: str, revision: str | None, kind: str):
    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    return ask(name, revision=revision, files_metadata=True, timeout=PATIENCE)


def _in_time(ask: Callable):
    """Return `ask()`; raise TimeoutError after `PATIENCE`, even where a name server or a proxy hangs."""
    done: dict = {}

    def work() -> None:
        try:
            done["answer"] = ask()
        except Exception as error:
            done["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if "error" in done:
        raise done["error"]
    if "answer" not in done:
        raise TimeoutError(f"no answer within {PATIENCE:.0f} s")
    return done["answer"]


def _while_busy(ask: Callable):
    """Return `ask()`, tried again after each of `WAITS` while the Hub answers 429 or 5xx."""
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if status != 429 and status < 500:
                raise
            print(f"The Hub is busy ({status}): again in {wait} s", flush=True)
        time.sleep(wait)
    return ask()


def _sentence(name: str, revision: str | None, kind: str, error: Exception) -> str:
    """Return what is missing, why, and what to do."""
    at = f"{name} at {revision[:8]}" if revision else name
    if isinstance(error, GatedRepoError):
        return f"The {kind} {name} wants its terms accepted: do so on its page and log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"The {kind} {name} has no revision {revision} on the Hub: check the revision, {OFFLINE_WAY}."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no {kind} {name}, neither a path here nor on the Hub ({constants.ENDPOINT}), or it is private: "
            f"check the parameter `{kind}`, {OFFLINE_WAY}."
        )
    missing = f"The {kind} {at} is not (wholly) in the cache {constants.HF_HUB_CACHE}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{missing} and HF_HUB_OFFLINE forbids to fetch it: unset it once, {OFFLINE_WAY}."
    cause = first_line(error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error)
    return f"{missing} and could not be fetched from {constants.ENDPOINT} ({cause}): try again later, {OFFLINE_WAY}."
