"""Files on the Hub: fetched once into its cache, announced beforehand, and one clear sentence where that cannot be."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache

from . import AlpacaError

PATIENCE = 4.0  # seconds for the Hub's first answer; its own library would try for 47 s
WAITS = (1, 2, 4, 8)  # seconds between tries while the Hub answers that it is busy
OFFLINE_WAY = "or run the model that comes with the project: PROFILE=pocket (in a notebook, profile = 'pocket')"


def fetch(name: str, revision: str | None, kind: str, patterns: list[str]) -> Path:
    """Return the cache's folder of `name` on the Hub; files of `patterns` not yet in it are announced and downloaded.

    `revision` is a commit, branch or tag, None the newest commit; `kind` is `model` or `dataset`. Raises AlpacaError
    within 5 s if the Hub cannot be reached; later, if it breaks off.
    """
    which: dict = {"repo_type": kind, "revision": revision}
    try:
        info = _while_busy(_in_time, HfApi().repo_info, name, files_metadata=True, timeout=PATIENCE, **which)
        files = [file for file in info.siblings if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
        if not files:
            raise AlpacaError(f"{name} on the Hub has no {patterns[0]}: choose another {kind}.", "hub-unknown")
        if new := [f for f in files if not try_to_load_from_cache(name, f.rfilename, None, info.sha, kind)]:
            size, names = readable_size(sum(file.size or 0 for file in new)), ", ".join(file.rfilename for file in new)
            print(f"Downloading {name} from the Hub, {size}, once: {names}", flush=True)
        folder = Path(_while_busy(snapshot_download, name, allow_patterns=patterns, **which))
        if not all((folder / file.rfilename).exists() for file in files):  # where it broke off early, no error comes
            raise ConnectionError("not all files came")
        return folder
    except AlpacaError:
        raise
    except Exception as error:  # the library's exceptions differ from release to release
        raise _explained(error, name, revision, kind) from error


def cached_folder(name: str, revision: str | None, kind: str, patterns: list[str]) -> Path | None:
    """Return the cache's folder of `name` without asking the Hub; None if there is none, or it is known to be partial.

    Of what `fetch` began it is known whether a file of `patterns` is missing; of what came file by file it is not.
    """
    which: dict = {"repo_type": kind, "revision": revision, "allow_patterns": patterns}
    with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        return Path(snapshot_download(name, local_files_only=True, **which))
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, without its full stop; the error's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def readable_size(size: float) -> str:
    """Return a number of bytes in MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _in_time(ask: Callable, *given, **named):
    """Return what `ask` does; raise TimeoutError after `PATIENCE`, even where a name server or a proxy hangs."""
    answer: Future = Future()

    def work() -> None:
        try:
            answer.set_result(ask(*given, **named))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # no executor: it would be waited for at exit
    return answer.result(PATIENCE)


def _while_busy(ask: Callable, *given, **named):
    """Return what `ask` does, tried again after each of `WAITS` while the Hub answers 429 or 5xx."""
    for wait in WAITS:
        try:
            return ask(*given, **named)
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if status != 429 and status < 500:
                raise
            print(f"The Hub is busy ({status}): again in {wait} s", flush=True)
        time.sleep(wait)
    return ask(*given, **named)


def _explained(error: Exception, name: str, revision: str | None, kind: str) -> AlpacaError:
    """Return what is missing, why, and what to do."""
    what = f"The {kind} {name}"
    if isinstance(error, errors.GatedRepoError):
        return AlpacaError(f"{what} wants its terms accepted: do so on its page, then `hf auth login`.", "hub-gated")
    if isinstance(error, errors.RevisionNotFoundError):
        return AlpacaError(f"{what} has no revision {revision} on the Hub: check it, {OFFLINE_WAY}.", "hub-unknown")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        what = f"There is no {kind} {name}, neither a path here nor on the Hub ({constants.ENDPOINT}), or it is private"
        return AlpacaError(f"{what}: check the parameter `{kind}`, {OFFLINE_WAY}.", "hub-unknown")
    what += f" at {revision[:8]}" if revision else ""
    what += f" is not (wholly) in the cache {constants.HF_HUB_CACHE}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        what += " and HF_HUB_OFFLINE forbids to fetch it"
        return AlpacaError(f"{what}: unset it once, {OFFLINE_WAY}.", "hub-offline")
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    what += f" and could not be fetched from {constants.ENDPOINT} ({first_line(cause or error)})"
    return AlpacaError(f"{what}: try again later, {OFFLINE_WAY}.", "hub-unreachable")
