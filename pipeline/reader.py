"""The one reader of features: single rows, from mapped shards whose index is parsed once, crc32c checked.

Measured (python -m benchmarks reader; 2 cores, warm, shuffled rows of 257x1408 fp16): this reads near the speed of a
bare memory map; tensorstore reaches a third of that and zarr's own index lists a twentieth. Hence a direct reader.
Copy and checksum release the GIL, so a few threads read several rows at once; no process is forked.
"""

import json
import mmap
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline import int8, objects, places
from pipeline.cache import LocalCache
from pipeline.commits import reasons, summary
from pipeline.index import Index
from xformer.errors import StoreError

MISSING = 2**64 - 1  # both index entries of an inner chunk that is not stored
BLOCK = 1 << 18  # bytes that are copied and then checked
ROWS_AT_ONCE = 8  # a thread takes so many rows, so that handing them over costs little
OPEN_SHARDS = 4096  # mapped at once, over all arrays of a process; Linux allows 65,530 maps

REQUESTS = 32  # to an object store at once; one connection gives tens of MB/s, a trainer needs hundreds
Entry = tuple[mmap.mmap, np.ndarray, Path]  # a shard's bytes, its index, its local file

_lock = threading.Lock()
_open: OrderedDict[tuple[int, int], Entry] = OrderedDict()


@cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS, "object-store")


def array_metadata(store: Path, name: str) -> tuple[tuple[int, ...], np.dtype, dict[str, Any]]:
    """Shape, dtype and attributes of an array. Raises FileNotFoundError where there is none."""
    about = json.loads(places.read(store / name / "zarr.json"))
    if about.get("node_type") != "array":
        raise FileNotFoundError(f"{store / name}: there is no such array")
    return tuple(about["shape"]), np.dtype(about["data_type"]), about["attributes"]


def _copy_checked(out: np.ndarray, source: np.ndarray) -> bool:
    """Copies a row that is followed by its crc32c; returns whether the checksum is right."""
    found = 0
    for start in range(0, len(out), BLOCK):  # what was copied is checked while the CPU's cache holds it
        block = out[start : start + BLOCK]
        block[:] = source[start : start + len(block)]
        found = google_crc32c.extend(found, block)  # type: ignore[arg-type]
    return found == int.from_bytes(source[-4:], "little")


def shard_file(store: Path, name: str, shard: int, ndim: int) -> Path:
    return store / name / "c" / "/".join([str(shard), *["0"] * (ndim - 1)])


class FeatureArray:
    """Reads single rows of one array; int8 tokens come back as float16.

    Raises on any read: StoreError for a row that is dead, not committed, missing or damaged.
    """

    def __init__(self, store: Path, name: str, index: Index, cache: LocalCache | None = None) -> None:
        shape, self.dtype, self.attributes = array_metadata(store, name)
        self.store, self.name, self.index, self.shape = store, name, index, shape[1:]
        self.row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self._ndim = len(shape)
        self._commits = summary(store, name, index.shards)
        self._cache = (cache or LocalCache()) if places.is_object(store) else None
        if shape[0] != index.count:
            raise StoreError(f"{store}: {name} has {shape[0]} rows, the index {index.count}.")
        if self._commits.prints - {self.attributes["fingerprint"]}:
            raise StoreError(f"{store}: {name} has shards that were made by another encoder than the array says.")
        self.channels: np.ndarray | None = None
        if "channel_scale" in self.attributes:
            self.channels = np.array(self.attributes["channel_scale"], np.float32)
            self._scale = FeatureArray(store, f"{name.rpartition('/')[0]}/scale", index, cache)

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
            out: a C-contiguous array of that shape, for example pinned; left out, a new one.
            pool: reads the rows in its threads.
        """
        if self.channels is None:
            return self.raw(rows, out, pool)
        out = np.empty((len(rows), *self.shape), np.float16) if out is None else out
        tokens, scale = self.raw(rows, None, pool), self._scale.raw(rows)
        int8.dequantise_into(out, tokens, scale, self.channels)
        return out

    def raw(
        self, rows: np.ndarray | list[int], out: np.ndarray | None = None, pool: ThreadPoolExecutor | None = None
    ) -> np.ndarray:
        """Reads `rows` as they are stored: int8 tokens without their scales."""
        out = np.empty((len(rows), *self.shape), self.dtype) if out is None else out
        flat, wanted = out.reshape(len(rows), -1).view(np.uint8), np.asarray(rows, np.int64)
        self._check(wanted)

        def read_rows(part: slice) -> None:
            for row, target in zip(wanted[part].tolist(), flat[part], strict=True):
                self._read_row(row, target)

        if self._cache is not None:
            list(_requests().map(read_rows, [slice(i, i + 1) for i in range(len(wanted))]))
        elif pool is None:
            read_rows(slice(None))
        else:
            list(pool.map(read_rows, [slice(i, i + ROWS_AT_ONCE) for i in range(0, len(wanted), ROWS_AT_ONCE)]))
        return out

    def _check(self, rows: np.ndarray) -> None:
        outside = rows[(rows < 0) | (rows >= self.index.count)]
        if len(outside):
            raise StoreError(f"{self.store}: {self.name} has rows 0 to {self.index.count - 1}, not {outside[0]}.")
        if len(dead := rows[np.isin(rows, self.dead_rows)]):
            raise StoreError(f"{self.store}: {self.name} row {dead[0]} is a dead letter: {self.dead[int(dead[0])]}.")

    def _read_row(self, row: int, out: np.ndarray) -> None:
        shard, inner = divmod(row, self.index.shard_rows)
        mapped, table, file = self._shard(shard)
        offset, size = table.item(inner, 0), table.item(inner, 1)
        if offset == MISSING or size != self.row_bytes + 4 or offset + size > len(mapped):
            raise self._damaged(shard, f"row {row} is missing")
        source = np.frombuffer(mapped, np.uint8, size, offset)
        if self._cache is None:
            intact = _copy_checked(out, source)
        elif not (intact := bool(source[-4:].any()) and _copy_checked(out, source)):  # not in the cache's file yet
            content = self._fetch(shard, offset, size)
            if intact := _copy_checked(out, np.frombuffer(content, np.uint8)):
                self._cache.keep(file, offset, content)
        if not intact:
            raise self._damaged(shard, f"row {row} fails its crc32c")

    def _fetch(self, shard: int, offset: int, size: int) -> bytes:
        try:
            return objects.read_range(shard_file(self.store, self.name, shard, self._ndim), offset, size)
        except FileNotFoundError:
            raise self._damaged(shard, "there is no such object") from None

    def _shard(self, shard: int) -> Entry:
        key = id(self), shard
        with _lock:
            if key in _open and (self._cache is None or os.path.exists(_open[key][2])):  # else it was evicted
                _open.move_to_end(key)
                return _open[key]
        entry = self._map(shard)
        with _lock:
            _open[key] = entry
            while len(_open) > OPEN_SHARDS:
                _open.popitem(last=False)  # unmapped when the last thread that reads it is done
            if self._cache is not None and self._cache.removed:
                gone, self._cache.removed = set(self._cache.removed), []
                for key in [key for key, (_, _, file) in _open.items() if file in gone]:
                    del _open[key]
        return entry

    def _map(self, shard: int) -> Entry:
        size, footer = int(self._commits.bytes[shard]), self.index.shard_rows * 16 + 4
        if size < 0:
            raise StoreError(f"{self.store}: {self.name} shard {shard} is not committed; run the extraction again.")
        file = shard_file(self.store, self.name, shard, self._ndim)
        try:
            if self._cache is not None:
                file = self._cache.shard(file, size, self._commits.sha256[shard].decode(), footer)
            with file.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._damaged(shard, f"cannot be opened: {error}") from None
        if len(mapped) != size:
            raise self._damaged(shard, f"{len(mapped)} bytes instead of {size}")
        table = mapped[size - footer : size - 4]
        if google_crc32c.value(table) != int.from_bytes(mapped[-4:], "little"):
            if self._cache is not None:
                file.unlink(missing_ok=True)  # damaged on this disk: the next read fetches it again
            raise self._damaged(shard, "its shard index fails its crc32c")
        return mapped, np.frombuffer(table, "<u8").reshape(-1, 2), file

    def __del__(self) -> None:
        with _lock:
            for key in [key for key in _open if key[0] == id(self)]:
                del _open[key]

    def _damaged(self, shard: int, what: str) -> StoreError:
        file = shard_file(self.store, self.name, shard, self._ndim)
        return StoreError(
            f"{file} is damaged: {what}; run: xformer store verify {self.store} --repair, then extract again."
        )
