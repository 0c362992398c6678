"""The index of a store: which image is in which row, fixed before any encoder runs and never renumbered.

`index/rows.parquet` holds one record per planned image, in row groups of whole shards; `index/captions.arrow` holds one
record per caption in row order and is read at random where the caption lies, so that neither is ever loaded whole.
Of a store in an object store both are copied to the local cache when they are first needed.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from pipeline import places
from pipeline.cache import LocalCache
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
MAX_CAPTION = 1 << 30  # bytes; a damaged offset asks for more
HASHES = 65536  # images per chunk of the Zarr array of their sha256, which is not compressed


class Index:
    """Reads an index. Row groups are read one at a time; captions stay on disk.

    Raises on any read: StoreError, which names the file, where one of the index's files is missing or damaged.
    """

    def __init__(self, folder: Path, cache: LocalCache | None = None) -> None:
        self.folder, self.cache = folder, cache or LocalCache()
        known = ("corpus", "images", "captions", "dead", "shard_rows")
        try:
            self.description = places.read_json(folder / "index.json", *known)  # the marker
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{folder.parent} has no finished index; run: xformer extract --store {folder.parent}"
            ) from None
        check = self.description.pop("check", None)  # of a store that was planned before there was one: none
        if check is not None and check != description_check(self.description):
            raise StoreError(
                f"{folder / 'index.json'} is damaged (its content does not match its hash); restore it from a copy of the "
                "store, or extract into a new store."
            )
        self.count: int = self.description["images"]
        self.shard_rows: int = self.description["shard_rows"]
        self.shards = -(-self.count // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row and the row after the last of a shard. Raises StoreError for one that there is not."""
        if not 0 <= shard < self.shards:
            raise StoreError(
                f"{self.folder.parent} has shards 0 to {self.shards - 1}, not {shard}: a commit record of shard {shard} "
                "is not of this store; remove it."
            )
        return shard * self.shard_rows, min(self.count, (shard + 1) * self.shard_rows)

    def shard(self, shard: int) -> list[dict]:
        """The records of one shard."""
        start, stop = self.bounds(shard)
        with self._rows() as file:
            group = file.metadata.row_group(0).num_rows
            records = file.read_row_group(start // group)
        return records.slice(start % group, stop - start).to_pylist()

    def ids(self) -> Iterator[list[str]]:
        """The ids of each shard in turn."""
        with self._rows() as file:
            left: list[str] = []
            for batch in file.iter_batches(batch_size=self.shard_rows, columns=["id"]):
                left += batch["id"].to_pylist()
                while len(left) >= self.shard_rows:
                    yield left[: self.shard_rows]
                    left = left[self.shard_rows :]
            if left:
                yield left

    @contextmanager
    def _local(self, name: str) -> Iterator[Path]:
        """One of the index's files on this machine; whatever reading it raises becomes one sentence."""
        try:
            yield self.cache.file(self.folder / name, self.description.get("sha256", {}).get(name))
        except (pa.ArrowException, OSError, LookupError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            what = "there is no such file" if missing else " ".join(str(error).split())[:200]
            raise StoreError(
                f"{self.folder / name} is damaged: {what}; restore it from a copy, or extract into a new store."
            ) from None

    @contextmanager
    def _rows(self, columns: list[str] | None = None) -> Iterator[pq.ParquetFile]:
        """rows.parquet; `columns` are read by their dictionaries."""
        with self._local("rows.parquet") as path, pq.ParquetFile(path, read_dictionary=columns) as file:
            if file.metadata.num_rows != self.count:
                raise ValueError(f"{file.metadata.num_rows} rows instead of {self.count}")
            yield file

    def column(self, *names: str) -> pa.Table:
        """Whole columns of the index, as Arrow."""
        with self._rows() as file:
            return file.read(columns=list(names))

    def damaged(self) -> list[str]:
        """The index's own files whose bytes are not those that were planned, one line each."""
        said = "its bytes are not those that were planned; restore it from a copy, or extract into a new store"

        def now(file: Path) -> str:
            try:
                return file_sha256(self.cache.file(file))
            except OSError:
                return ""

        planned = {self.folder / name: want for name, want in self.description.get("sha256", {}).items()}
        return [f"{file}: {said}" for file, want in planned.items() if now(file) != want]

    def dead(self) -> Iterator[dict]:
        """Rows that were dead letters at planning."""
        if not self.description["dead"]:
            return
        with self._rows() as file:
            for batch in file.iter_batches(columns=["row", "id", "source", "status", "reason"]):
                bad = pc.equal(batch["status"], "dead")  # type: ignore
                for row in batch.filter(bad).to_pylist():
                    yield {key: row[key] for key in ("row", "id", "source", "reason")}

    def usable(self, split: str) -> np.ndarray:
        """Whether each row belongs to `split` and was readable at planning, bool [rows]; never reads a whole table."""
        found = np.empty(self.count, bool)
        with self._rows(["split", "status"]) as file:
            row = 0
            for batch in file.iter_batches(batch_size=1 << 16, columns=["split", "status"]):
                part = found[row : row + len(batch)]
                part[:] = True
                for name, value in (("split", split), ("status", "ok")):
                    column = batch[name]  # compared by its codes: 14 million strings would take a second
                    part &= column.indices.to_numpy() == column.dictionary.index(value).as_py()
                row += len(batch)
        return found

    def id_of(self, row: int) -> str:
        """The sample id of one row; reads one row group."""
        with self._rows() as file:
            group = file.metadata.row_group(0).num_rows
            return file.read_row_group(row // group, columns=["id"])["id"][row % group].as_py()

    def find(self, ids: list[str]) -> np.ndarray:
        """The row of each id, int64, -1 where there is none; never holds more than a batch of the ids there are."""
        wanted = pa.array(ids, pa.string())
        found, row = np.full(len(ids), -1, np.int64), 0
        with self._rows() as file:
            for batch in file.iter_batches(batch_size=1 << 16, columns=["id"]):
                places = pc.index_in(wanted, value_set=batch["id"]).fill_null(-1).to_numpy(zero_copy_only=False)  # type: ignore
                found[places >= 0] = row + places[places >= 0]
                row += len(batch)
        return found

    def image_keys(self, rows: np.ndarray) -> np.ndarray:
        """A number for each image, int64: the first bytes of its sha256, so the same picture has the same in every store."""
        found = np.empty(len(rows), np.int64)
        for part in np.unique(rows // HASHES):
            with self._local(f"c/{part}/0") as path, path.open("rb", buffering=0) as file:
                for at in np.flatnonzero(rows // HASHES == part).tolist():
                    key = os.pread(file.fileno(), 8, int(rows[at]) % HASHES * 32)
                    if len(key) < 8:
                        raise ValueError(f"it is cut off before row {rows[at]}")
                    found[at] = int.from_bytes(key, "little", signed=True)
        return found

    def captions(self) -> tuple[np.ndarray, "Captions"]:
        """The row of every caption (int32, int64 from 2^31 rows on, [captions]) and the captions, which stay on disk."""
        with self._local("captions.arrow") as path:
            captions = Captions(path)
        kind = np.int32 if self.count < 2**31 else np.int64
        rows, row, place = np.empty(len(captions), kind), 0, 0
        with self._rows() as file:  # their counts are small; the captions stay untouched
            for batch in file.iter_batches(batch_size=1 << 17, columns=["captions"]):
                part = np.repeat(np.arange(row, row + len(batch), dtype=kind), batch["captions"].to_numpy())
                rows[place : place + len(part)] = part
                row, place = row + len(batch), place + len(part)
            if place != len(captions):
                raise ValueError(f"it counts {place} captions, captions.arrow holds {len(captions)}")
        return rows, captions


class Captions:
    """Random access to the texts of an Arrow file, in O(log batches), by two small reads each.

    Memory-mapped, every caption would keep the 64 KiB around it in memory: 100 MB after a batch of 1,680, and ever more.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.open("rb", buffering=0)
        with pa.memory_map(str(file)) as source:
            whole = source.read_buffer()
            chunks = [chunk for chunk in pa.ipc.open_file(whole).read_all()["text"].chunks if len(chunk)]
            # of the map: this is how Arrow tells where each batch's offsets and texts lie in the file
            places = [[buffer.address - whole.address for buffer in chunk.buffers()[1:]] for chunk in chunks]
        self._places = np.array(places, np.int64).reshape(-1, 2)
        self._starts = np.cumsum([0, *[len(chunk) for chunk in chunks]])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> str:
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        offsets, texts = self._places[chunk].tolist()
        at = os.pread(self._file.fileno(), 8, offsets + 4 * (i - int(self._starts[chunk])))
        start, end = int.from_bytes(at[:4], "little"), int.from_bytes(at[4:], "little")
        try:
            if len(at) == 8 and 0 <= end - start <= MAX_CAPTION:
                text = os.pread(self._file.fileno(), end - start, texts + start)
                if len(text) == end - start:
                    return text.decode()
        except (OSError, UnicodeDecodeError):
            pass
        raise StoreError(f"{self._file.name} is damaged at caption {i}; restore it from a copy.")


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def description_check(description: dict) -> str:
    """The hash of all of index.json but itself, as it stands there under "check"."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def ids_sha256(ids: list[str]) -> str:
    """The hash of a shard's ids in row order, as its commit record holds it."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
