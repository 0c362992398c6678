"""The one reader of features: single rows, from shards whose index is parsed once, crc32c checked.

A row is read with preadv in pieces, straight into the batch's memory, and each piece is checked there while the CPU's
cache holds it: what is delivered is what was checked. A memory map would cost a page fault for every 64 KiB that is read
for the first time, which in a store larger than the memory is every read, and a failing disk or a cut file would be a
SIGBUS instead of an error. Reading and checksum release the GIL, so a few threads read several rows at once; no process
is forked.

Measured (python -m benchmarks reader; 2 cores, other work beside it, warm, shuffled rows of 257x1408): 0.75 (fp16) and
0.85 (int8) of np.take from a memory map whose pages are all mapped already, 0.73 and 0.83 in two threads; 4 to 5 times
tensorstore, 8 to 10 times zarr's own index lists. The checksum decides: awscrt's takes 80 GB/s from the cache, that of
google-crc32c, which zarr uses, 28 GB/s, with which this would be 0.65.
"""

import errno
import hashlib
import itertools
import json
import os
import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from awscrt.checksums import crc32c

from pipeline import int8, objects, places
from pipeline.cache import LocalCache
from pipeline.commits import reasons, summary
from pipeline.index import Index
from xformer.errors import StoreError

MISSING = 2**64 - 1  # both index entries of an inner chunk that is not stored
BLOCK = 1 << 18  # bytes that are read and then checked
ROWS_AT_ONCE = 8  # a thread takes so many rows, so that handing them over costs little
FILES, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # that this process may open
OPEN_SHARDS = 4096 if FILES == resource.RLIM_INFINITY else min(4096, FILES // 2)  # at once, over all arrays
OURS = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM)  # this process's errors, not a shard's
MEND = "the store itself is not damaged; mend that (too many open files: ulimit -n) and run again"
REQUESTS = 32  # to an object store at once; one connection gives tens of MB/s, a trainer needs hundreds


class Shard:
    """An open shard file; it is closed when the last thread that reads it is done.

    size: of the file, bytes. table: uint64 [rows, 2], offset and bytes of each row.
    """

    size: int
    table: np.ndarray

    def __init__(self, file: Path) -> None:
        self.file, self.handle = file, -1
        self.handle = os.open(file, os.O_RDONLY)

    def read(self, out: np.ndarray, offset: int) -> bool:
        """Fills uint8 [n] from `offset` on; returns whether the crc32c that follows is right."""
        checked, done = 0, 0
        while done < len(out):
            block = out[done : done + BLOCK]
            count = os.preadv(self.handle, [block], offset + done)  # type: ignore[list-item]
            if count == 0:
                return False
            checked, done = crc32c(block[:count], checked), done + count  # type: ignore[arg-type]
        return checked == int.from_bytes(os.pread(self.handle, 4, offset + done), "little")

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


_lock = threading.Lock()
_open: OrderedDict[tuple[int, int, bytes], Shard] = OrderedDict()  # by array, shard, and the sha256 of its bytes
_arrays = itertools.count()
_gone: deque[int] = deque()  # arrays that are no more, whose shards are still open


def _close() -> None:
    """Closes the shards of arrays that are no more; the caller holds the lock."""
    while _gone:
        number = _gone.popleft()
        for key in [key for key in _open if key[0] == number]:
            del _open[key]


@cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS, "object-store")


def array_metadata(store: Path, name: str) -> tuple[tuple[int, ...], np.dtype, dict[str, Any]]:
    """Shape, dtype and attributes of an array.

    Raises: FileNotFoundError where there is none, StoreError where what makes its values does not match its checksums.
    """
    file, remedy = store / name / "zarr.json", f"run: xformer store verify {store} --repair"
    about = places.read_json(file, "node_type", remedy=remedy)
    if about["node_type"] != "array":
        raise FileNotFoundError(f"{store / name}: there is no such array")
    try:
        attributes, wrong = about["attributes"], ""
        found = tuple(about["shape"]), np.dtype(about["data_type"]), attributes
        if fingerprint(attributes["identity"]) != attributes["fingerprint"]:
            wrong = "its identity does not match its fingerprint"
        elif int8.digest(attributes.get("channel_scale")) != attributes.get("channel_scale_sha256"):
            wrong = "its channel_scale does not match its sha256"
        elif not isinstance(attributes["usage"], dict):
            wrong = "its usage is none"
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        wrong = str(error)
    if wrong:
        raise StoreError(f"{file} is damaged ({wrong}); {remedy}")
    return found


def refuse_mixed(store: Path, name: str, index: Index) -> None:
    """Raises StoreError for an array that was not made over the rows of this index: other images, order or shards.

    One whose zarr.json cannot be read is left to `array_metadata`, which says so.
    """
    try:
        about = places.read_json(store / name / "zarr.json")
        have = {"images": about["shape"][0], "rows a shard": about["chunk_grid"]["configuration"]["chunk_shape"][0]}
        rows = [found["rows_sha256"] for found in (about["attributes"], index.description) if "rows_sha256" in found]
    except (StoreError, OSError, LookupError, TypeError, AttributeError):
        return
    want = {"images": index.count, "rows a shard": index.shard_rows}
    wrong = [f"{have[what]} {what} instead of the index's {want[what]}" for what in want if have[what] != want[what]]
    if len(set(rows)) > 1:
        wrong.append("other ids or pictures than the index")
    if wrong:
        at = places.shown(store)
        raise StoreError(
            f"{at}: {name} has {wrong[0]}, so they are not of one extraction; restore {at}/index from a copy, or extract "
            "into a new store."
        )


def fingerprint(identity: dict[str, Any]) -> str:
    """One hash of everything that decides a feature's value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def shard_file(store: Path, name: str, shard: int, ndim: int) -> Path:
    return store / name / "c" / "/".join([str(shard), *["0"] * (ndim - 1)])


class FeatureArray:
    """Reads single rows of one array; int8 tokens come back as float16.

    A shard that is made again meanwhile (`store retry`, `verify --repair`) is noticed where its old record does not fit
    any more, and is then read as it is now.

    Raises on any read: StoreError for a row that is dead, not committed, missing or damaged.
    """

    def __init__(self, store: Path, name: str, index: Index, cache: LocalCache | None = None) -> None:
        self._number = next(_arrays)
        shape, self.dtype, self.attributes = array_metadata(store, name)
        refuse_mixed(store, name, index)
        self.store, self.name, self.index, self.shape = store, name, index, shape[1:]
        self.row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self._ndim = len(shape)
        self._cache = (cache or LocalCache()) if places.is_object(store) else None
        self._read_commits()
        self.channels: np.ndarray | None = None
        if self.dtype == np.int8 and "channel_scale" not in self.attributes:
            raise StoreError(f"{store}: {name} is int8 and has no channel_scale, so its values cannot be known.")
        if "channel_scale" in self.attributes:
            self.channels = np.array(self.attributes["channel_scale"], np.float32)
            self._scale = FeatureArray(store, f"{name.rpartition('/')[0]}/scale", index, cache)

    def _read_commits(self) -> None:
        self._commits = summary(self.store, self.name, self.index.shards)
        self.__dict__.pop("dead", None)
        if self._commits.prints - {self.attributes["fingerprint"]}:
            raise StoreError(
                f"{self.store}: {self.name} has shards that were made by another encoder than the array says."
            )

    @property
    def missing_shards(self) -> list[int]:
        return np.flatnonzero(self._commits.bytes < 0).tolist()

    @property
    def dead_rows(self) -> np.ndarray:
        """The rows that are dead letters, int64, sorted."""
        return self._commits.dead

    @cached_property
    def dead(self) -> dict[int, str]:
        """The reason of each dead row."""
        return reasons(self.store, self.name) if len(self.dead_rows) else {}

    def read(
        self, rows: np.ndarray | list[int], out: np.ndarray | None = None, pool: ThreadPoolExecutor | None = None
    ) -> np.ndarray:
        """Reads `rows` in the order given into [len(rows), *shape], float16 where int8 is stored.

        Args:
            out: a C-contiguous array of that shape and type, for example pinned; left out, a new one.
            pool: reads the rows in its threads.

        Raises: ValueError for another `out`.
        """
        if self.channels is None:
            return self.raw(rows, out, pool)
        out = self._target(len(rows), np.dtype(np.float16), out)
        scale, channels = self._scale.raw(rows), self.channels

        def decode(wanted: list[int], part: slice) -> None:
            tokens = np.empty(self.shape, np.int8)  # of one row, decoded while the CPU's cache holds it
            for row, target, factor in zip(wanted, out[part], scale[part], strict=True):
                self._read_row(row, tokens.reshape(-1).view(np.uint8))
                int8.dequantise_into(target, tokens, factor, channels)

        self._in_parts(rows, decode, pool)
        return out

    def raw(
        self, rows: np.ndarray | list[int], out: np.ndarray | None = None, pool: ThreadPoolExecutor | None = None
    ) -> np.ndarray:
        """Reads `rows` as they are stored: int8 tokens without their scales. Raises ValueError for an unfit `out`."""
        out = self._target(len(rows), self.dtype, out)
        flat = out.reshape(len(rows), -1).view(np.uint8)

        def read(wanted: list[int], part: slice) -> None:
            for row, target in zip(wanted, flat[part], strict=True):
                self._read_row(row, target)

        self._in_parts(rows, read, pool)
        return out

    def _target(self, rows: int, dtype: np.dtype, out: np.ndarray | None) -> np.ndarray:
        shape = (rows, *self.shape)
        if out is None:
            return np.empty(shape, dtype)
        if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
            order = "" if out.flags.c_contiguous else ", not contiguous"
            raise ValueError(f"{self.name}: out is {out.dtype} {out.shape}{order}; it must be {dtype} {shape}.")
        return out

    def _in_parts(
        self, rows: np.ndarray | list[int], read: Callable[[list[int], slice], None], pool: ThreadPoolExecutor | None
    ) -> None:
        """Calls read(some of the rows, their places), from an object store for one row at a time in many threads."""
        wanted = np.asarray(rows, np.int64)
        self._check(wanted)
        pool, size = (pool, ROWS_AT_ONCE) if self._cache is None else (_requests(), 1)
        parts = [slice(i, i + size) for i in range(0, len(wanted), size)] if pool else [slice(None)]
        list((pool.map if pool else map)(lambda part: read(wanted[part].tolist(), part), parts))

    def _check(self, rows: np.ndarray) -> None:
        outside = rows[(rows < 0) | (rows >= self.index.count)]
        if len(outside):
            raise StoreError(f"{self.store}: {self.name} has rows 0 to {self.index.count - 1}, not {outside[0]}.")
        if np.isin(rows, self.dead_rows).any():
            self._read_commits()  # it may have been revived since
        if len(dead := rows[np.isin(rows, self.dead_rows)]):
            why = self.dead.get(int(dead[0]), "it is being made again")
            raise StoreError(f"{self.store}: {self.name} row {dead[0]} is a dead letter: {why}.")

    def _read_row(self, row: int, out: np.ndarray) -> None:
        number, inner = divmod(row, self.index.shard_rows)
        shard = self._shard(number)
        offset, size = shard.table.item(inner, 0), shard.table.item(inner, 1)
        if offset == MISSING or size != self.row_bytes + 4 or offset + size > shard.size:
            raise self._damaged(number, f"row {row} is missing")
        try:
            kept = self._cache is None or any(os.pread(shard.handle, 4, offset + self.row_bytes))  # else a hole
            intact = kept and shard.read(out, offset)
        except OSError as error:
            if self._cache is None:
                raise self._damaged(number, f"row {row} cannot be read: {error.strerror}") from None
            intact = False  # the cache's disk fails, not the store: the row is fetched
        if self._cache is not None and not intact:
            content = self._fetch(number, offset, size)
            if intact := crc32c(content[:-4]) == int.from_bytes(content[-4:], "little"):
                out[:] = np.frombuffer(content, np.uint8, self.row_bytes)
                self._cache.keep(shard.file, offset, content)
        if not intact:
            raise self._damaged(number, f"row {row} fails its crc32c")

    def _fetch(self, shard: int, offset: int, size: int) -> bytes:
        try:
            return objects.read_range(shard_file(self.store, self.name, shard, self._ndim), offset, size)
        except FileNotFoundError:
            raise self._damaged(shard, "there is no such object") from None

    def _shard(self, number: int) -> Shard:
        commits = self._commits
        key = self._number, number, commits.sha256[number]
        with _lock:
            _close()
            if key in _open and (self._cache is None or os.path.exists(_open[key].file)):  # else it was evicted
                _open.move_to_end(key)
                return _open[key]
        try:
            shard = self._opened(number, int(commits.bytes[number]), key[2].decode())
        except StoreError:
            with suppress(OSError, StoreError):
                self._read_commits()
            if self._commits.sha256[number] == key[2]:
                raise
            return self._shard(number)  # it was made again since its record was read
        with _lock:
            _open[key] = shard
            while len(_open) > OPEN_SHARDS:
                _open.popitem(last=False)
            if self._cache is not None and self._cache.removed:
                gone, self._cache.removed = set(self._cache.removed), []
                for key in [key for key, shard in _open.items() if shard.file in gone]:
                    del _open[key]
        return shard

    def _opened(self, number: int, size: int, sha256: str) -> Shard:
        footer = self.index.shard_rows * 16 + 4
        if size < 0:
            raise StoreError(f"{self.store}: {self.name} shard {number} is not committed; run the extraction again.")
        file = shard_file(self.store, self.name, number, self._ndim)
        try:
            if self._cache is not None:
                file = self._cache.shard(file, size, sha256, footer)
            shard = Shard(file)
            found, table = os.fstat(shard.handle).st_size, os.pread(shard.handle, footer, size - footer)
        except OSError as error:
            if self._cache is None and error.errno not in OURS:
                raise self._damaged(number, f"cannot be opened: {error.strerror}") from None
            raise StoreError(f"{file} cannot be opened: {error.strerror}; {MEND}.") from None
        if found != size:
            raise self._damaged(number, f"{found} bytes instead of {size}")
        if crc32c(table[:-4]) != int.from_bytes(table[-4:], "little"):
            if self._cache is not None:
                file.unlink(missing_ok=True)  # damaged on this disk: the next read fetches it again
            raise self._damaged(number, "its shard index fails its crc32c")
        shard.size = size
        shard.table = np.frombuffer(table[:-4], "<u8").reshape(-1, 2)
        return shard

    def __del__(self) -> None:
        _gone.append(self._number)
        if _lock.acquire(blocking=False):  # else whoever holds it closes them next: this may run inside of its `with`
            try:
                _close()
            finally:
                _lock.release()

    def _damaged(self, shard: int, what: str) -> StoreError:
        file = shard_file(self.store, self.name, shard, self._ndim)
        return StoreError(f"{file} is damaged: {what}; run: xformer store verify {self.store} --repair")
