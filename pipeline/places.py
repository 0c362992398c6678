"""Where a store's bytes live: in a folder of this machine, or in an object store. One function for each operation.

A place is a Path. pathlib folds s3://bucket/key to s3:/bucket/key, which is how an object is told from a file. On disk
a write is a temporary file, fsync and a rename or an exclusive link (xformer/publish.py); in an object store it is one
put, conditional (If-None-Match: *) where it must be exclusive. A missing file or object raises FileNotFoundError.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import objects
from xformer import publish
from xformer.errors import StoreError


def is_object(path: Path) -> bool:
    return path.parts[:1] == ("s3:",)


def shown(path: Path) -> str:
    """A place as a person writes it."""
    return f"s3://{'/'.join(path.parts[1:])}" if is_object(path) else str(path)


def absolute(path: Path) -> Path:
    return path if is_object(path) else path.resolve()


def read(path: Path) -> bytes:
    return objects.read(path) if is_object(path) else path.read_bytes()


def read_json(path: Path, *keys: str, remedy: str = "restore it from a copy of the store") -> dict[str, Any]:
    """A JSON object that a store keeps.

    Raises: FileNotFoundError or NotADirectoryError where there is none; StoreError, with the file and the remedy, where
    it cannot be read, is cut off, or lacks one of `keys`.
    """
    try:
        content = json.loads(read(path))
        if not isinstance(content, dict):
            wrong = "it is no JSON object"
        else:
            wrong = "; ".join(f"it has no {key}" for key in keys if key not in content)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        wrong = f"it cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        wrong = str(error) or type(error).__name__
    if wrong:
        raise StoreError(f"{path} is damaged ({wrong}); {remedy}.")
    return content


def exists(path: Path) -> bool:
    """Whether there is such a file or object; folders do not count."""
    return objects.head(path) is not None if is_object(path) else path.is_file()


def children(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in a folder; none where it is missing."""
    if is_object(folder):
        return objects.children(folder)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [e.name for e in entries if e.is_file()], [e.name for e in entries if e.is_dir()]


def walk(folder: Path) -> dict[Path, int]:
    """Every file below a folder, with its bytes."""
    if is_object(folder):
        return objects.walk(folder)
    return {f: f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}


def write(path: Path, content: bytes | memoryview) -> None:
    """Replaces a file or object in one step."""
    if is_object(path):
        objects.put(path, content)
    else:
        publish.write_bytes(path, content)


def copy(source: Path, target: Path) -> None:
    """Copies a file or object of any size, from wherever to wherever; it appears whole."""
    if is_object(source):
        with tempfile.TemporaryDirectory() as folder:
            objects.download(source, Path(folder) / source.name)
            copy(Path(folder) / source.name, target)
    elif is_object(target):
        objects.upload(source, target)
    else:
        publish.copy(source, target)


def write_exclusive(path: Path, content: bytes) -> bool:
    """Publishes a file or object unless it exists; returns whether this call did it."""
    return objects.create(path, content) if is_object(path) else publish.write_exclusive(path, content)


def remove(path: Path) -> None:
    """Removes a file or object; one that is gone already is no error."""
    if is_object(path):
        objects.delete([path])
    else:
        path.unlink(missing_ok=True)


@contextmanager
def built_here(place: Path, name: str, last: str) -> Iterator[Path]:
    """Yields a folder in which to build `name`: `place` itself, or a temporary one that is then put into the object
    store, the file called `last` after all others."""
    if not is_object(place):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        files = [file for file in walk(Path(folder) / name) if file.name != last]
        for file in [*files, Path(folder) / name / last]:
            objects.upload(file, place / file.relative_to(folder))


def remove_folder(folder: Path) -> None:
    if is_object(folder):
        objects.delete(list(objects.walk(folder)))
    else:
        shutil.rmtree(folder, ignore_errors=True)
