"""Files on the Hub: downloaded once into its cache, announced beforehand, and one clear sentence where that fails."""

import os
import time
from contextlib import suppress
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import filter_repo_objects
from tqdm import tqdm

from . import AlpacaError

PATIENCE = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 4)  # seconds for the Hub's first answer; the library's: 10
WAITS = (1, 2, 4, 8, 8)  # seconds between tries while the Hub answers that it is busy
OFFLINE_WAY = "or run the model that comes with the project: PROFILE=pocket (in a notebook, profile = 'pocket')"
REFUSED = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)  # gated ones too


def fetch(name: str, revision: str | None, kind: str, patterns: list[str]) -> Path:
    """Return the cache's folder of `name` on the Hub; files of `patterns` not yet in it are announced and downloaded.

    `revision` is a commit, branch or tag, None the newest commit; `kind` is `model` or `dataset`. Raises AlpacaError
    within `PATIENCE` if the Hub cannot be reached, later if the download breaks off; a busy Hub is asked again.
    """
    waits = iter(WAITS)
    while True:
        try:
            return _download(name, patterns, repo_type=kind, revision=revision)
        except Exception as error:  # the library's exceptions differ from release to release
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if not (wait := next(waits, 0) if status in (429, 500, 502, 503, 504) else 0):
                raise _explained(error, name, revision, kind) from error
        print(f"The Hub is busy ({status}): again in {wait} s", flush=True)
        time.sleep(wait)


def _download(name: str, patterns: list[str], **which) -> Path:
    with ThreadPool(1) as pool:  # a thread that can be left behind where a name server or a proxy hangs
        # no dry run of the download: where the Hub cannot be reached, that tries for 23 s
        info: Any = pool.apply_async(HfApi().repo_info, [name], {"files_metadata": True, **which}).get(PATIENCE)
    files = list(filter_repo_objects(info.siblings, allow_patterns=patterns, key=lambda file: file.rfilename))
    if not files:
        raise errors.HFValidationError(f"it has no {patterns[0]}")
    cached = {"revision": info.sha, "repo_type": which["repo_type"]}
    if new := [file for file in files if not try_to_load_from_cache(name, file.rfilename, **cached)]:
        size, names = sum(file.size or 0 for file in new), ", ".join(file.rfilename for file in new)
        print(f"Downloading {name} from the Hub, {tqdm.format_sizeof(size, 'B')}, once: {names}", flush=True)
    folder = Path(snapshot_download(name, allow_patterns=patterns, **which))
    if not all((folder / file.rfilename).exists() for file in files):  # the library returns what is there
        raise ConnectionError("not all files came")
    return folder


def _explained(error: Exception, name: str, revision: str | None, kind: str) -> AlpacaError:
    """Return what is missing, why, and what to do."""
    what = f"The {kind} {name} at {revision[:8]}" if revision else f"The {kind} {name}"
    reason = first_line((isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__) or error)
    if isinstance(error, REFUSED):
        what += f" is neither a path here nor to be had on the Hub, {constants.ENDPOINT} ({reason})"
        remedy = "check its name and revision, accept its terms on its page and `hf auth login`"
        return AlpacaError(f"{what}: {remedy}, {OFFLINE_WAY}.")
    if isinstance(error, TimeoutError):
        reason = f"no answer within {PATIENCE:g} s; HF_HUB_ETAG_TIMEOUT sets another limit"
    what += f" is not wholly in the cache {constants.HF_HUB_CACHE} and could not be fetched from {constants.ENDPOINT}"
    return AlpacaError(f"{what} ({reason}): try again later, {OFFLINE_WAY}.")


def cached_folder(name: str, revision: str | None, kind: str, patterns: list[str]) -> Path | None:
    """Return the cache's folder of `name` without asking the Hub; None if there is none, or it is known to be partial.

    A file of `patterns` that is missing is noticed only after `fetch`, not where files came one by one.
    """
    with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        which: dict = {"repo_type": kind, "revision": revision, "allow_patterns": patterns}
        return Path(snapshot_download(name, local_files_only=True, **which))
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, without its full stop; the error's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
