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

    def captions(self) -> tuple[np.ndarray, "Captions"]:
        """The row of every caption (int64 [captions]) and the captions themselves, memory-mapped."""
        with pa.memory_map(str(self.folder / "captions.arrow")) as source:
            table = pa.ipc.open_file(source).read_all()
        return table["row"].to_numpy(), Captions(table["text"])


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
