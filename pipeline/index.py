"""The index of a store: which image is in which row, fixed before any encoder runs and never renumbered.

`index/rows.parquet` holds one record per planned image, one row group per shard; `index/captions.arrow` holds one
record per caption in row order and is memory-mapped, so that a trainer reads captions at random without loading them.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from xformer.errors import StoreError

ROWS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("location", pa.string()),
        ("sha256", pa.binary(32)),
        ("size", pa.int64()),
        ("captions", pa.int32()),
        ("split", pa.string()),
        ("status", pa.string()),  # "ok", or "dead" with the reason
        ("reason", pa.string()),
    ]
)
CAPTIONS = pa.schema([("row", pa.int64()), ("text", pa.string())])
HASHES = 65536  # images per chunk of the Zarr array of their sha256, which is not compressed


class Index:
    """Reads an index. Row groups are read one at a time; captions stay on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        marker = folder / "index.json"
        if not marker.is_file():
            raise StoreError(f"{folder.parent} has no finished index; run: xformer extract --store {folder.parent}")
        self.description = json.loads(marker.read_text(encoding="utf-8"))
        self.count: int = self.description["images"]
        self.shard_rows: int = self.description["shard_rows"]
        self.shards = -(-self.count // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row and the row after the last of a shard."""
        return shard * self.shard_rows, min(self.count, (shard + 1) * self.shard_rows)

    def shard(self, shard: int) -> list[dict]:
        """The records of one shard."""
        with pq.ParquetFile(self.folder / "rows.parquet") as file:
            return file.read_row_group(shard).to_pylist()

    def column(self, *names: str) -> pa.Table:
        """Whole columns of the index, as Arrow."""
        return pq.read_table(self.folder / "rows.parquet", columns=list(names))

    def damaged(self) -> list[str]:
        """The index's own files whose bytes are not those that were planned, one line each."""
        said = "its bytes are not those that were planned; restore it from a copy, or extract into a new store"
        planned = {self.folder / name: digest for name, digest in self.description.get("sha256", {}).items()}
        return [f"{f}: {said}" for f, digest in planned.items() if not f.is_file() or file_sha256(f) != digest]

    def dead(self) -> Iterator[dict]:
        """Rows that were dead letters at planning."""
        for row in self.column("row", "id", "source", "status", "reason").to_pylist():
            if row["status"] == "dead":
                yield {key: row[key] for key in ("row", "id", "source", "reason")}

    def usable(self, split: str) -> np.ndarray:
        """Whether each row belongs to `split` and was readable at planning, bool [rows]; never reads a whole table."""
        found = np.empty(self.count, bool)
        with pq.ParquetFile(self.folder / "rows.parquet", read_dictionary=["split", "status"]) as file:
            row = 0
            for batch in file.iter_batches(batch_size=1 << 16, columns=["split", "status"]):
                wanted = (pc.equal(batch[name], value) for name, value in (("split", split), ("status", "ok")))  # type: ignore
                found[row : row + len(batch)] = pc.and_(*wanted).to_numpy(zero_copy_only=False)  # type: ignore
                row += len(batch)
        return found

    def id_of(self, row: int) -> str:
        """The sample id of one row; reads one row group."""
        with pq.ParquetFile(self.folder / "rows.parquet") as file:
            group = file.read_row_group(row // self.shard_rows, columns=["id"])
        return group["id"][row % self.shard_rows].as_py()

    def image_keys(self, rows: np.ndarray) -> np.ndarray:
        """A number for each image, int64: the first bytes of its sha256, so the same picture has the same in every store."""
        found = np.empty(len(rows), np.int64)
        for part in np.unique(rows // HASHES):
            at = rows // HASHES == part
            hashes = np.memmap(self.folder / "c" / str(part) / "0", np.uint8, "r").reshape(-1, 32)
            found[at] = np.ascontiguousarray(hashes[rows[at] % HASHES, :8]).view("<i8")[:, 0]
        return found

    def captions(self) -> tuple[np.ndarray, "Captions"]:
        """The row of every caption (int32, int64 from 2^31 rows on, [captions]) and the captions, memory-mapped."""
        with pa.memory_map(str(self.folder / "captions.arrow")) as source:
            table = pa.ipc.open_file(source).read_all()
        rows, at = np.empty(len(table), np.int32 if self.count < 2**31 else np.int64), 0
        for chunk in table["row"].chunks:
            rows[at : at + len(chunk)] = chunk.to_numpy()
            at += len(chunk)
        return rows, Captions(table["text"])


class Captions:
    """Random access to memory-mapped captions in O(log batches)."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = column.chunks
        self._starts = np.cumsum([0, *[len(chunk) for chunk in self._chunks]])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> str:
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._chunks[chunk][i - int(self._starts[chunk])].as_py()


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def ids_sha256(ids: list[str]) -> str:
    """The hash of a shard's ids in row order, as its commit record holds it."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
