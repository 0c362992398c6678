"""Objects of s3://bucket/key through obstore: bounded retries, conditional puts, and a lease for the one writer.

Endpoint, region and credentials come from AWS's environment variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_SKIP_SIGNATURE for anonymous access). Plain http is taken for this machine,
else only with AWS_ALLOW_HTTP=true. A 5xx, a broken connection or a timeout is tried again with growing pauses until
PATIENCE is over; then it is one StoreError. A 404 is a FileNotFoundError at once.
"""

import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from xformer.errors import StoreError

PATIENCE = 25.0  # seconds in which a request is tried again
TIMEOUT = 20.0  # seconds of one request; both together stay under a minute
LEASE = 60.0  # seconds after which a writer that does not renew its lease counts as dead
LEASE_NAME = "writer.json"


@cache
def _client(bucket: str, endpoint: str | None, process: int) -> Any:
    """One client per bucket and process: its threads do not survive a fork."""
    try:
        from obstore.store import S3Store
    except ImportError:
        raise StoreError(f"s3://{bucket}: install what reads object stores: pip install 'xformer-mllm[s3]'") from None
    local = urlsplit(endpoint or "").hostname in ("127.0.0.1", "localhost", "::1")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    options: dict[str, Any] = {"timeout": timedelta(seconds=TIMEOUT), "connect_timeout": timedelta(seconds=5)}
    pauses = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
    return S3Store(
        bucket,
        region=region,
        client_options=options | ({"allow_http": True} if local else {}),  # type: ignore[arg-type]
        retry_config={"max_retries": 12, "retry_timeout": timedelta(seconds=PATIENCE), "backoff": pauses},  # type: ignore
    )


def _open(path: Path) -> tuple[Any, str]:
    if len(path.parts) < 3:
        raise StoreError(f"{path}: write s3://BUCKET/PATH.")
    return _client(path.parts[1], os.environ.get("AWS_ENDPOINT_URL"), os.getpid()), "/".join(path.parts[2:])


def _ask[T](path: Path, request: Callable[[Any, str], T]) -> T:
    """Raises FileNotFoundError for a 404, FileExistsError where a condition failed, StoreError for all else."""
    client, key = _open(path)
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    try:
        return request(client, key)
    except (AlreadyExistsError, PreconditionError):
        raise FileExistsError(f"{path}: the object exists already or was changed") from None
    except (BaseError, ValueError, OSError) as error:
        if "NoSuchBucket" in str(error):  # S3's code, in a 404 as well
            raise StoreError(f"{path}: there is no bucket {path.parts[1]}; make it, or mend the path.") from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{path}: there is no such object") from None
        what = " ".join(str(error).split())[:300]
        raise StoreError(f"{path}: the object store does not do what it is asked: {what}; run again later.") from None


def read(path: Path) -> bytes:
    return _ask(path, lambda client, key: client.get(key).bytes().to_bytes())


def read_range(path: Path, start: int, size: int) -> bytes:
    return _ask(path, lambda client, key: client.get_range(key, start=start, length=size).to_bytes())


def head(path: Path) -> dict[str, Any] | None:
    """size, e_tag and last_modified of an object; None where there is none."""
    try:
        return _ask(path, lambda client, key: client.head(key))
    except FileNotFoundError:
        return None


def download(path: Path, file: Path) -> None:
    """An object into a local file, piece by piece."""

    def stream(client: Any, key: str) -> None:
        with file.open("wb") as target:
            for piece in client.get(key).stream(min_chunk_size=1 << 22):
                try:
                    target.write(piece)
                    target.flush()
                except OSError as error:
                    raise StoreError(f"{file.parent} cannot be written: {error.strerror}; make room there.") from None

    _ask(path, stream)


def children(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the objects in a folder, and of the folders in it."""
    found = _ask(folder, lambda client, key: client.list_with_delimiter(key))
    files = sorted(Path(entry["path"]).name for entry in found["objects"])
    return files, sorted(Path(prefix).name for prefix in found["common_prefixes"])


def walk(folder: Path) -> dict[Path, int]:
    """Every object below a folder, with its bytes."""
    bucket = Path(*folder.parts[:2])
    pages = _ask(folder, lambda client, key: list(client.list(key, chunk_size=1000)))
    return {bucket / entry["path"]: entry["size"] for page in pages for entry in page}


def put(path: Path, content: bytes | memoryview) -> None:
    """Replaces an object in one step; a large one in parts, which become visible together."""
    _ask(path, lambda client, key: client.put(key, content))


def upload(file: Path, path: Path) -> None:
    """A local file into an object, piece by piece."""
    _ask(path, lambda client, key: client.put(key, file))


def create(path: Path, content: bytes) -> bool:
    """Writes an object only where there is none; returns whether this call did it."""
    try:
        _ask(path, lambda client, key: client.put(key, content, mode="create", use_multipart=False))
    except FileExistsError:
        return read(path) == content  # a put whose answer was lost and that was tried again finds itself
    return True


def delete(paths: list[Path]) -> None:
    for path in paths:
        try:
            _ask(path, lambda client, key: client.delete(key))
        except FileNotFoundError:
            pass


@contextmanager
def lease(store: Path) -> Iterator[bool]:
    """One writer per store, over all machines: an object that names it and that it renews.

    A lease that was not renewed for LEASE seconds, or whose process on this machine is gone, is taken over by a put that
    is conditional on its ETag. Even two writers would not mix: commit records are exclusive.
    Yields whether it is ours. Raises StoreError at the end where it was lost.
    """
    place, lost, ended = store / LEASE_NAME, threading.Event(), threading.Event()
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}).encode()
    if not create(place, mine) and not _taken_over(place, mine):
        yield False
        return

    def renew() -> None:
        while not ended.wait(LEASE / 4):
            try:
                if read(place) != mine:
                    lost.set()
                    return
                put(place, mine)
            except (StoreError, FileNotFoundError):
                continue  # the work itself will say what is wrong

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield True
        if lost.is_set():
            raise StoreError(f"{store}: another extraction took it over; what was committed stays, see store verify.")
    finally:
        ended.set()
        thread.join()
        if not lost.is_set():
            delete([place])


def _taken_over(place: Path, mine: bytes) -> bool:
    try:
        found = _ask(place, lambda client, key: client.get(key))
        age = (datetime.now(UTC) - found.meta["last_modified"]).total_seconds()
        try:
            other = json.loads(found.bytes().to_bytes())
            dead = other["host"] == socket.gethostname() and not Path(f"/proc/{other['pid']}").exists()
        except (ValueError, LookupError, TypeError):
            dead = False  # cut or foreign: it counts until it is old
        if age < LEASE and not dead:
            return False
        mode: Any = {"e_tag": found.meta["e_tag"]}
        _ask(place, lambda client, key: client.put(key, mine, mode=mode, use_multipart=False))
        return read(place) == mine
    except (FileExistsError, FileNotFoundError):
        return False  # another one was quicker
