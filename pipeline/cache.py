"""The local cache of what a trainer reads from an object store: a folder with a budget of bytes.

A shard of 512 rows of 257x1408 fp16 has 370 MB, and a shuffled batch touches nearly as many shards as it has rows. To
fetch whole shards would move 512 rows for the one that is asked for, again and again wherever the cache is smaller than
the store. So large shards are fetched row by row with range requests, into a sparse file of the shard's size; the row's
crc32c is checked, and also tells later whether the row is in the file, so neither a crash nor a half-written row can
deliver anything wrong. Shards of up to 8 MiB (masks, scales, small encoders) are fetched whole and checked against the
sha256 of their commit record. Files are named by that sha256: a shard that was made again never meets its old rows.
The files that were opened longest ago go first. Several processes may share a folder.
"""

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import objects, places
from xformer.errors import StoreError

WHOLE = 8 << 20  # bytes up to which a shard is fetched at once
BUDGET = 50_000_000_000

_lock = threading.Lock()
_used: dict[Path, int] = {}  # bytes in a folder, as far as this process knows


@dataclass
class LocalCache:
    """Args: folder: left out, ~/.cache/xformer. budget: bytes of shards on disk; an index and captions come on top."""

    folder: Path | None = None
    budget: int = BUDGET

    def __post_init__(self) -> None:
        self.removed: list[Path] = []  # evicted files; who has them open closes them, which frees the disk
        self.root = self.folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xformer"

    def shard(self, place: Path, size: int, sha256: str, footer: int) -> Path:
        """The local file of a committed shard; large ones hold their shard index and the rows that were read.

        Raises: StoreError where the object is missing or is not what its commit record says.
        """
        file = self.root / "shards" / sha256
        with self._usable():
            try:
                os.utime(file)  # the newest
                return file
            except FileNotFoundError:
                pass
            self.make_room(min(size, WHOLE) if size <= WHOLE else footer)
        try:
            if size <= WHOLE:
                content = objects.read(place)
                wrong = len(content) != size or hashlib.sha256(content).hexdigest() != sha256
            else:
                head = objects.head(place)
                wrong = head is None or head["size"] != size
                content = b"" if wrong else objects.read_range(place, size - footer, footer)
        except FileNotFoundError:
            raise StoreError(f"{place} is damaged: there is no such object.") from None
        if wrong:
            raise StoreError(f"{place} is damaged: it is not what its commit record says.")
        with self._usable():
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", dir=file.parent)
            try:
                with os.fdopen(handle, "r+b") as target:
                    target.truncate(size)
                    os.pwrite(target.fileno(), content, size - len(content))
                os.link(name, file)
            except FileExistsError:
                pass  # another process was quicker
            finally:
                os.unlink(name)
        return file

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """What goes wrong on this machine's disk is told as such, not as damage of the store."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"the local cache {self.root} cannot be used: {error.strerror}; make room or mend its rights, or set "
                "store.cache_dir to another folder."
            ) from None

    def keep(self, file: Path, offset: int, content: bytes) -> None:
        """Writes a checked row into its shard's file. A full disk or an evicted file only means that it is not kept."""
        with suppress(OSError):
            self.make_room(len(content))
            handle = os.open(file, os.O_WRONLY)
            try:
                os.pwrite(handle, content, offset)
            finally:
                os.close(handle)

    def make_room(self, more: int) -> None:
        """Removes the oldest files until `more` bytes fit; counts anew after each sixteenth of the budget, because
        other processes write too."""
        with _lock:
            used = _used.get(self.root)
            if (
                used is None
                or used + more > self.budget
                or used // (self.budget // 16 + 1) != (used + more) // (self.budget // 16 + 1)
            ):
                used = self._sweep(more)
            _used[self.root] = used + more

    def _sweep(self, more: int) -> int:
        folder, entries = self.root / "shards", []
        for entry in os.scandir(folder) if folder.is_dir() else ():
            try:
                entries.append((entry.stat().st_mtime_ns, entry.stat().st_blocks * 512, entry.path))
            except FileNotFoundError:
                continue
        used = sum(size for _, size, _ in entries)
        goal = self.budget if used + more <= self.budget else self.budget * 7 // 8
        for _, size, name in sorted(entries):
            if used + more <= goal:
                break
            Path(name).unlink(missing_ok=True)
            self.removed.append(Path(name))
            used -= size
        return used

    def file(self, place: Path, sha256: str | None = None) -> Path:
        """A whole object as a local file, for the index; a local file is itself.

        Args:
            sha256: what it must be; left out, the object as it is now.

        Raises: FileNotFoundError, StoreError.
        """
        if not places.is_object(place):
            return place
        key = sha256
        if key is None:
            head = objects.head(place)
            if head is None:
                raise FileNotFoundError(f"{place}: there is no such object")
            where = f"{os.environ.get('AWS_ENDPOINT_URL')} {place} {head['e_tag']}"
            key = hashlib.sha256(where.encode()).hexdigest()
        file = self.root / "index" / f"{key[:40]}-{place.name}"
        with self._usable():
            if file.exists():
                return file
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", dir=file.parent)
            os.close(handle)
        try:
            objects.download(place, Path(name))
            with open(name, "rb") as stream:
                if sha256 is not None and hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                    raise StoreError(f"{place} is damaged: its bytes are not those that were planned.")
            os.replace(name, file)
        finally:
            Path(name).unlink(missing_ok=True)
        return file
