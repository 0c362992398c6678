"""Writing an index: fixes which image is in which row, before any encoder runs (pipeline/index.py reads it)."""

import hashlib
import os
import struct
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import zarr

from pipeline.captioned import Row
from pipeline.corpora import Corpus, hash_image
from pipeline.index import CAPTIONS, ROWS, description_check, file_sha256
from xformer import publish
from xformer.console import progress
from xformer.errors import CorpusError

CAPTION_BATCH = 16384
ROW_GROUP = 16384  # about so many rows, in whole shards: Parquet's footer lists every group
READERS = 16  # threads that read and hash; disks and file servers answer many requests at once
AHEAD = 8 * READERS  # images that are asked for before the one that is written


def split_of(row: Row, val_fraction: float) -> str:
    """The row's own split, else one decided by the hash of its id: the same in every corpus and every order."""
    if row.split:
        return row.split
    value = struct.unpack("<Q", hashlib.sha256(f"split/{row.id}".encode()).digest()[:8])[0] / 2**64
    return "val" if value < val_fraction else "train"


def hashed(root: Path, rows: Iterable[Row], forget: bool = False) -> Iterator[tuple[Row, bytes, int, str]]:
    """Each row with the sha256 of its image, its bytes, and why it is unusable ("" where it is not), in order.

    Several threads read ahead; what they hold is a few pieces of an image, however large or many they are.
    """

    def read(row: Row) -> tuple[bytes, int, str]:
        try:
            digest, size = hash_image(root, row.location, forget)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            return hashlib.sha256().digest(), 0, row.reason or f"cannot be read: {why}"
        return digest, size, row.reason or ("" if size else "the file is empty")

    with ThreadPoolExecutor(READERS, "hash") as pool:
        ahead = deque()
        for row in rows:
            ahead.append((row, pool.submit(read, row)))
            if len(ahead) >= AHEAD:
                first, found = ahead.popleft()
                yield first, *found.result()
        for row, found in ahead:
            yield row, *found.result()


def write_index(folder: Path, corpus: Corpus, shard_rows: int, val_fraction: float, limit: int | None) -> dict:
    """Plans a store: reads every image's bytes once for its sha256 and fixes the row order.

    Returns the index's description. Raises: CorpusError for an empty corpus and for ids that stand twice (all listed).
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = array("Q")  # of 8 bytes each: a set of 14 million ids would take over 1 GB
    counts: Counter[str] = Counter()
    every = hashlib.sha256()  # id and image of every row in order: arrays carry it, so that none meets another index
    temporary = {name: folder / f".{name}.partial" for name in ("rows.parquet", "captions.arrow")}
    try:
        with (
            pq.ParquetWriter(temporary["rows.parquet"], ROWS, compression="zstd") as rows_file,
            pa.OSFile(str(temporary["captions.arrow"]), "wb") as sink,
            pa.ipc.new_file(sink, CAPTIONS) as captions_file,
            progress("read and hash", corpus.expected(limit), "images") as bar,
        ):
            rows: list[dict] = []
            captions: list[dict] = []
            planned = hashed(corpus.root, islice(corpus.rows(), limit))
            for number, (row, digest, size, reason) in enumerate(planned):
                keys.frombytes(hashlib.blake2b(row.id.encode(), digest_size=8).digest())
                every.update(f"{row.id}\n".encode() + digest)
                record = _record(row, number, corpus.kind, split_of(row, val_fraction), digest, size, reason)
                rows.append(record)
                captions += [{"row": number, "text": text} for text in row.captions]
                counts["images"] += 1
                counts["captions"] += len(row.captions)
                counts["dead"] += record["status"] == "dead"
                counts[record["split"]] += 1
                if len(rows) == shard_rows * max(1, ROW_GROUP // shard_rows):
                    rows_file.write_table(pa.Table.from_pylist(rows, ROWS))
                    rows.clear()
                if len(captions) >= CAPTION_BATCH:
                    captions_file.write_table(pa.Table.from_pylist(captions, CAPTIONS))
                    captions.clear()
                bar.total = max(bar.total, number + 1)  # of tars it was an estimate
                bar.advance()
            bar.total = counts["images"]
            if rows:
                rows_file.write_table(pa.Table.from_pylist(rows, ROWS))
            if captions:
                captions_file.write_table(pa.Table.from_pylist(captions, CAPTIONS))
        if doubled := _doubled(np.frombuffer(keys, np.uint64), temporary["rows.parquet"]):
            shown = ", ".join(doubled[:20]) + (f" and {len(doubled) - 20} more" if len(doubled) > 20 else "")
            raise CorpusError(f"{len(doubled)} image ids stand twice in the corpus: {shown}; make every id unique.")
        if not counts["images"]:
            raise CorpusError("the corpus holds no images.")
        description = {
            "corpus": {"kind": corpus.kind, "identity": corpus.identity, "limit": limit, "val_fraction": val_fraction},
            "shard_rows": shard_rows,
            "rows_sha256": every.hexdigest(),
            **{key: counts[key] for key in ("images", "captions", "dead", "train", "val")},
        }
        for name, path in temporary.items():
            publish.fsync_path(path)
            os.replace(path, folder / name)
        _publish_hashes(folder, counts["images"], description["corpus"])
        files = sorted(p for p in (*(folder / "c").rglob("*"), *(folder / name for name in temporary)) if p.is_file())
        description["sha256"] = {p.relative_to(folder).as_posix(): file_sha256(p) for p in files}
        # the marker: the index is whole
        publish.write_json(folder / "index.json", description | {"check": description_check(description)})
        return description
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _doubled(keys: np.ndarray, rows: Path) -> list[str]:
    """The ids that stand twice, by their keys uint64 [images], in the order in which they stand again."""
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order[1:]] == keys[order[:-1]]]
    return pq.read_table(rows, columns=["id"])["id"].take(np.sort(again)).to_pylist() if len(again) else []


def _publish_hashes(folder: Path, count: int, corpus: dict) -> None:
    """The images' sha256 as a Zarr array [images, 32], so that the index is a member of the group like any other."""
    array = zarr.create_array(
        folder.parent,
        name=folder.name,
        shape=(count, 32),
        chunks=(min(count, 65536), 32),
        dtype="uint8",
        compressors=None,
        attributes={
            "content": "sha256 of every image file; rows.parquet and captions.arrow lie beside",
            "corpus": corpus,
        },
    )
    row = 0
    with pq.ParquetFile(folder / "rows.parquet") as file:
        for batch in file.iter_batches(batch_size=65536, columns=["sha256"]):
            values = np.frombuffer(b"".join(batch["sha256"].to_pylist()), np.uint8).reshape(-1, 32)
            array[row : row + len(values)] = values
            row += len(values)


def _record(row: Row, number: int, source: str, split: str, digest: bytes, size: int, reason: str) -> dict:
    return {
        "row": number,
        "id": row.id,
        "source": source,
        "location": row.location,
        "sha256": digest,
        "size": size,
        "captions": len(row.captions),
        "split": split,
        "status": "dead" if reason else "ok",
        "reason": reason,
    }
