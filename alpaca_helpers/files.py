"""Atomic writes that never replace files of others; checksums; a full disk in one sentence."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, EEXIST, EISDIR, ELOOP, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path

from safetensors import SafetensorError

from . import AlpacaError

CHECKSUMS = "checksums.json"  # in data, a checkpoint and an adapter: the SHA-256 of each file
DIGEST = re.compile("[0-9a-f]{64}")
WEIGHTS, CARD = "adapter_model.safetensors", "README.md"  # the card beside an adapter is written after its checksums
LEFT_BEHIND = ("cache-*.arrow", ".DS_Store", "Thumbs.db", "desktop.ini")  # by datasets, by file browsers
NO_SPACE = os.strerror(ENOSPC)
UNWRITABLE = {EACCES, EPERM, EROFS, EDQUOT, EEXIST, ENOTDIR, EISDIR, ELOOP, ENAMETOOLONG}


@contextmanager
def atomic_folder(folder: Path, needed: int = 0, checksums: bool = True) -> Iterator[Path]:
    """Give an empty folder to write to, which takes the place of `folder` if the block does not fail.

    Its files' `checksums` are written into it, last, and only a folder that has such is replaced. Where the disk has no
    room for the `needed` bytes, or cannot be written to, AlpacaError is raised and the earlier folder stays.
    """
    part, old = (folder.with_name(f".alpaca-{folder.name}.{end}") for end in ("part", "old"))

    def clean_up() -> None:
        if old.exists() and not folder.exists():  # the writing failed or was cut between the two renames below
            old.rename(folder)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)

    clean_up()
    if checksums:
        refuse_foreign_files(folder)
    with check_disk_space(folder, needed):
        try:
            part.mkdir(parents=True)
            yield part
            if checksums:
                write_checksums(part)
                refuse_foreign_files(folder)  # again: the block may have taken minutes
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
        finally:
            clean_up()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: where that fails, the earlier one stays; errors as in `check_disk_space`."""
    part = path.with_name(f".alpaca-{path.name}.part")
    with check_disk_space(path, needed=len(content)):
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def replace_recorded(path: Path, content: bytes) -> None:
    """Write a file as `replace_file` does, and its name into the checksums beside it.

    Raises AlpacaError for a file or link in its place that is not in these: it is somebody's.
    """
    saved = _read_checksums(path.parent)
    if os.path.lexists(path) and path.name not in saved:
        raise in_the_way(path)
    with check_disk_space(path, needed=len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.parent / CHECKSUMS, saved | {path.name: hashlib.sha256(content).hexdigest()})
        replace_file(path, content)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically; errors as in `replace_file`."""
    replace_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, remedy: str) -> dict:
    """Return the content of a JSON file; raise AlpacaError with what to do where it is broken."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AlpacaError(f"{path} is broken ({error}): {remedy}.") from error


@contextmanager
def check_disk_space(path: Path, needed: int = 0) -> Iterator[None]:
    """Raise AlpacaError where the disk has no room for `needed` bytes, or the block cannot write to `path`."""

    def free() -> int:
        return shutil.disk_usage(next(place for place in (path, *path.parents) if os.path.exists(place))).free

    def refusal(reason: str) -> AlpacaError:
        room = f"{-(-needed // 100_000) / 10:.1f} MB are needed, " * bool(needed) + f"{free() / 1e6:.1f} MB are free"
        return AlpacaError(f"{path} cannot be written ({reason}; {room}): make room, or take another `run` or name.")

    if free() < needed:
        raise refusal(NO_SPACE)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's error
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise refusal(str(error.strerror)) from error
        if NO_SPACE in str(error) or free() < needed / 4:
            raise refusal(NO_SPACE) from error
        raise


def refuse_foreign_files(folder: Path) -> None:
    """Raise AlpacaError that names a file in the folder that is not in its checksums: it is somebody's.

    It does so for a file or a link in the folder's place too; a folder that is not there is nobody's.
    """
    saved = _read_checksums(folder)
    recorded = {folder / name for name in (*saved, CHECKSUMS, *[CARD] * (WEIGHTS in saved))} if saved else set()
    for path in folder.rglob("*") if folder.is_dir() and not folder.is_symlink() else [folder]:
        is_file = path.is_symlink() or path.is_file()
        if is_file and path not in recorded and not any(map(path.match, LEFT_BEHIND)):
            raise in_the_way(path)


def in_the_way(path: Path) -> AlpacaError:
    """Return the error for a file that somebody else wrote where one is to be written."""
    return AlpacaError(f"{path} is in the way, and not recorded as written here: move it elsewhere, and try again.")


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of each file in the folder into it, last: without them the folder is incomplete."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    write_json(folder / CHECKSUMS, {path.relative_to(folder).as_posix(): content_hash(path) for path in files})


def verify_checksums(folder: Path) -> str:
    """Return what is wrong with a folder ("" if nothing): incomplete, or changed since its checksums were written."""
    saved = _read_checksums(folder)
    for name, digest in saved.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if content_hash(folder / name) != digest:
            return f"{name} is damaged"
    return "" if saved else "its writing was cut"


def _read_checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the folder's files by name; empty where there are none that are written here."""
    try:
        saved = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) and all(DIGEST.fullmatch(str(value)) for value in saved.values()) else {}


def content_hash(path: Path, pattern: str = "*") -> str:
    """Return the SHA-256 of a file, or of a folder's own files that match `pattern`; "" where there is neither."""
    if path.is_dir():
        files = [file for file in sorted(path.glob(pattern)) if file.is_file()]
        return hashlib.sha256("".join(f"{file.name} {content_hash(file)}\n" for file in files).encode()).hexdigest()
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
