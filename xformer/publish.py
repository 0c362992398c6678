"""Atomic publication: a file or directory appears whole under its name, or not at all."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Makes a file or a directory's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside `path` that takes its name in one step, durably, and vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        fsync_path(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a write that finds no space does not say where
        raise
    fsync_path(path.parent)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replaces `path` in one step; a reader sees the old bytes or the new ones."""
    with _replacing(path) as file:
        file.write_bytes(content)


def copy(source: Path, target: Path) -> None:
    """Copies a file of any size; it appears whole."""
    with _replacing(target) as file:
        shutil.copyfile(source, file)


def write_exclusive(path: Path, content: bytes) -> bool:
    """Publishes `path` durably unless it exists already; returns whether this call did it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.link(name, path)
    except FileExistsError:
        return False
    finally:
        Path(name).unlink(missing_ok=True)
    fsync_path(path.parent)
    return True


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=False) + "\n").encode())


@contextmanager
def directory(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that becomes `path` on success and vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        for file in partial.iterdir():
            fsync_path(file)
        fsync_path(partial)
        partial.chmod(0o755)
        os.replace(partial, path)
        fsync_path(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def exclusive(lock: Path) -> Iterator[bool]:
    """Holds a lock file, machine-wide, as long as the block runs; yields whether it is ours. A kill lets go of it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
