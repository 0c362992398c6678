"""The one reader of features: single rows, from mapped shards whose index is parsed once, crc32c checked.

Measured (python -m benchmarks reader; 2 cores, warm, shuffled rows of 257x1408 fp16): this reads near the speed of a
bare memory map; tensorstore reaches a third of that and zarr's own index lists a twentieth. Hence a direct reader.
Copy and checksum release the GIL, so a few threads read several rows at once; no process is forked.
"""

import mmap
import struct
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr

from pipeline import int8
from pipeline.commits import sizes
from pipeline.index import Index
from xformer.errors import StoreError

MISSING = 2**64 - 1  # both index entries of an inner chunk that is not stored
BLOCK = 1 << 18  # bytes that are copied and then checked
ROWS_AT_ONCE = 8  # a thread takes so many rows, so that handing them over costs little
OPEN_SHARDS = 4096  # mapped at once, over all arrays of a process; Linux allows 65,530 maps

_lock = threading.Lock()
_open: "OrderedDict[tuple[int, int], tuple[mmap.mmap, np.ndarray]]" = OrderedDict()


def shard_file(store: Path, name: str, shard: int, ndim: int) -> Path:
    return store / name / "c" / "/".join([str(shard), *["0"] * (ndim - 1)])


class FeatureArray:
    """Reads single rows of one array; int8 tokens come back as float16.

    Raises on any read: StoreError for a row that is dead, not committed, missing or damaged.
    """

    def __init__(self, store: Path, name: str, index: Index) -> None:
        array = zarr.open_array(store, path=name, mode="r")
        self.store, self.name, self.index = store, name, index
        self.shape, self.dtype = tuple(array.shape[1:]), np.dtype(array.dtype)
        self.attributes: dict[str, Any] = dict(array.attrs)
        self.row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self._ndim = len(array.shape)
        self.bytes, self.dead, prints = sizes(store, name, index.shards)
        if array.shape[0] != index.count:
            raise StoreError(f"{store}: {name} has {array.shape[0]} rows, the index {index.count}.")
        if prints - {self.attributes["fingerprint"]}:
            raise StoreError(f"{store}: {name} has shards that were made by another encoder than the array says.")
        self.channels: np.ndarray | None = None
        if "channel_scale" in self.attributes:
            self.channels = np.array(self.attributes["channel_scale"], np.float32)
            self._scale = FeatureArray(store, f"{name.rpartition('/')[0]}/scale", index)

    @property
    def missing_shards(self) -> list[int]:
        return np.flatnonzero(self.bytes < 0).tolist()

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

        if pool is None:
            read_rows(slice(None))
        else:
            list(pool.map(read_rows, [slice(i, i + ROWS_AT_ONCE) for i in range(0, len(wanted), ROWS_AT_ONCE)]))
        return out

    def _check(self, rows: np.ndarray) -> None:
        outside = rows[(rows < 0) | (rows >= self.index.count)]
        if len(outside):
            raise StoreError(f"{self.store}: {self.name} has rows 0 to {self.index.count - 1}, not {outside[0]}.")
        if self.dead and (row := next((r for r in rows.tolist() if r in self.dead), None)) is not None:
            raise StoreError(f"{self.store}: {self.name} row {row} is a dead letter: {self.dead[row]}.")

    def _read_row(self, row: int, out: np.ndarray) -> None:
        shard, inner = divmod(row, self.index.shard_rows)
        mapped, table = self._shard(shard)
        offset, size = table.item(inner, 0), table.item(inner, 1)
        if offset == MISSING or size != self.row_bytes + 4 or offset + size > len(mapped):
            raise self._damaged(shard, f"row {row} is missing")
        source, found = np.frombuffer(mapped, np.uint8, size, offset), 0
        for start in range(0, self.row_bytes, BLOCK):  # what was copied is checked while the CPU's cache holds it
            block = out[start : start + BLOCK]
            block[:] = source[start : start + len(block)]
            found = google_crc32c.extend(found, block)
        if found != int.from_bytes(source[-4:], "little"):
            raise self._damaged(shard, f"row {row} fails its crc32c")

    def _shard(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        key = id(self), shard
        with _lock:
            if key in _open:
                _open.move_to_end(key)
                return _open[key]
        entry = self._map(shard)
        with _lock:
            _open[key] = entry
            while len(_open) > OPEN_SHARDS:
                _open.popitem(last=False)  # unmapped when the last thread that reads it is done
        return entry

    def _map(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        if self.bytes[shard] < 0:
            raise StoreError(f"{self.store}: {self.name} shard {shard} is not committed; run the extraction again.")
        file = shard_file(self.store, self.name, shard, self._ndim)
        try:
            with file.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._damaged(shard, f"cannot be opened: {error}") from None
        if len(mapped) != self.bytes[shard]:
            raise self._damaged(shard, f"{len(mapped)} bytes instead of {self.bytes[shard]}")
        footer = self.index.shard_rows * 16
        table_bytes = mapped[len(mapped) - footer - 4 : len(mapped) - 4]
        (expected,) = struct.unpack("<I", mapped[-4:])
        if google_crc32c.value(table_bytes) != expected:
            raise self._damaged(shard, "its shard index fails its crc32c")
        return mapped, np.frombuffer(table_bytes, "<u8").reshape(-1, 2)

    def __del__(self) -> None:
        with _lock:
            for key in [key for key in _open if key[0] == id(self)]:
                del _open[key]

    def _damaged(self, shard: int, what: str) -> StoreError:
        file = shard_file(self.store, self.name, shard, self._ndim)
        return StoreError(
            f"{file} is damaged: {what}; run: xformer store verify {self.store} --repair, then extract again."
        )
