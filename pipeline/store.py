"""The feature store: one plain Zarr v3 group that any Zarr reader opens, and the exact, committed way in and out.

    store.zarr/index/{rows.parquet,captions.arrow,index.json}   the row order (pipeline/index.py)
    store.zarr/<array>/zarr.json                                e.g. clip/5/tokens, mae/draw-0/tokens, mae/draw-0/kept
    store.zarr/<array>/c/<shard>/...                            one shard = one unit of work, written once, whole
    store.zarr/<array>/commits/<shard>.json                     published last; readers see committed rows only

Inner chunk = one image, stored as raw bytes + crc32c. A missing row is an error, never zeros.
"""

import fcntl
import hashlib
import json
import mmap
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from pipeline.index import Index, ids_sha256
from xformer import publish
from xformer.errors import StoreError

SCHEMA = 1
MISSING = 2**64 - 1  # both index entries of an inner chunk that is not stored
OPEN_SHARDS = 512  # bounded: Linux allows 65,530 maps per process


def fingerprint(identity: dict[str, Any]) -> str:
    """One hash of everything that decides a feature's value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def first_difference(have: dict[str, Any], want: dict[str, Any]) -> str | None:
    """The first field in which two identities differ, as text; None when they are the same."""
    for key in sorted(set(have) | set(want)):
        if have.get(key) != want.get(key):
            return f"{key} is {have.get(key)!r} there and {want.get(key)!r} here"
    return None


@contextmanager
def owner(store: Path) -> Iterator[None]:
    """One writer per store, machine-wide. Raises StoreError at once where another one is at work."""
    store.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(store.parent / f".{store.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(f"{store} cannot be written: {error.strerror}.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise StoreError(f"{store}: another extraction is writing it; wait for it or give another --store.") from None
    finally:
        os.close(handle)


def create_array(
    store: Path, name: str, index: Index, shape: tuple[int, ...], dtype: str, identity: dict, usage: dict
) -> bool:
    """Declares an array before it is filled; returns whether it is new.

    Raises: StoreError where it exists and was made in another way; the field that differs is named.
    """
    if not store.exists() or not (store / "zarr.json").exists():
        zarr.open_group(store, mode="a", zarr_format=3, attributes={"xformer_schema": SCHEMA})
    if (store / name / "zarr.json").is_file():
        attributes = dict(zarr.open_array(store, path=name, mode="r").attrs)
        for part, want in (("identity", identity), ("usage", usage)):
            if difference := first_difference(attributes.get(part, {}), json.loads(json.dumps(want))):  # type: ignore
                raise StoreError(
                    f"{store}: {name} was made in another way: {difference}; give another --store, or the settings it "
                    "was made with."
                )
        return False
    zarr.create_array(
        store,
        name=name,
        shape=(index.count, *shape),
        chunks=(1, *shape),
        shards=(index.shard_rows, *shape),
        dtype=dtype,
        compressors=[Crc32cCodec()],
        fill_value=float("nan") if dtype.startswith("float") else 0,
        attributes={"identity": identity, "usage": usage, "fingerprint": fingerprint(identity)},
        config={"write_empty_chunks": True},
    )
    return True


def write_shard(
    store: Path,
    name: str,
    index: Index,
    shard: int,
    block: np.ndarray,
    ids: list[str],
    dead: list[dict],
    seconds: float,
) -> None:
    """Writes one whole shard and publishes its commit record last.

    Args:
        block: [rows, ...] of exactly the array's dtype and row shape; dead rows hold the fill value.

    Raises: StoreError for a wrong shape or dtype, or a row with a value that is not finite and no dead letter.
    """
    array = zarr.open_array(store, path=name, mode="r+", config={"write_empty_chunks": True})
    start, stop = index.bounds(shard)
    if block.shape != (stop - start, *array.shape[1:]) or block.dtype != array.dtype or len(ids) != stop - start:
        raise StoreError(f"{name} shard {shard}: {block.dtype} {block.shape} does not fit {array.dtype} {array.shape}.")
    if block.dtype.kind == "f":
        alive = np.setdiff1d(np.arange(start, stop), [d["row"] for d in dead]) - start
        for row in alive:
            if not np.isfinite(block[row]).all():
                raise StoreError(f"{name} row {start + row}: a value is not finite and the row is not a dead letter.")
    array[start:stop] = block
    file = shard_file(store, name, shard, block.ndim)
    publish.fsync_path(file)
    content = file.read_bytes()
    record = {
        "shard": shard,
        "rows": [start, stop],
        "ids_sha256": ids_sha256(ids),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "fingerprint": array.attrs["fingerprint"],
        "seconds": round(seconds, 3),
        "dead": dead,
    }
    publish.write_exclusive(commit_file(store, name, shard), (json.dumps(record) + "\n").encode())


def shard_file(store: Path, name: str, shard: int, ndim: int) -> Path:
    return store / name / "c" / "/".join([str(shard), *["0"] * (ndim - 1)])


def commit_file(store: Path, name: str, shard: int) -> Path:
    return store / name / "commits" / f"{shard}.json"


def committed(store: Path, name: str) -> dict[int, dict]:
    """The commit records of an array by shard."""
    folder = store / name / "commits"
    found = {}
    for file in folder.glob("[0-9]*.json") if folder.is_dir() else ():
        try:
            found[int(file.stem)] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{file}: damaged commit record ({error}); remove it and extract again.") from None
    return found


class FeatureArray:
    """Reads single rows of one array: shard index parsed once, shard mapped, one copy, crc32c checked.

    Raises on any read: StoreError for a row that is dead, not committed, missing or damaged.
    """

    def __init__(self, store: Path, name: str, index: Index) -> None:
        if not (store / name / "zarr.json").is_file():
            have = ", ".join(array_names(store)) or "nothing yet"
            raise StoreError(f"{store} has no array {name} (it holds {have}); extract it first.")
        array = zarr.open_array(store, path=name, mode="r")
        self.store, self.name, self.index = store, name, index
        self.shape, self.dtype = tuple(array.shape[1:]), np.dtype(array.dtype)
        self.attributes: dict[str, Any] = dict(array.attrs)
        self.row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self._ndim = len(array.shape)
        self.commits = committed(store, name)
        if array.shape[0] != index.count:
            raise StoreError(f"{store}: {name} has {array.shape[0]} rows, the index {index.count}.")
        wrong = [s for s, record in self.commits.items() if record["fingerprint"] != self.attributes["fingerprint"]]
        if wrong:
            raise StoreError(f"{store}: {name} shard {wrong[0]} was made by another encoder than the array says.")
        self.dead = {d["row"]: d["reason"] for record in self.commits.values() for d in record["dead"]}
        self._open: OrderedDict[int, tuple[mmap.mmap, np.ndarray]] = OrderedDict()

    @property
    def missing_shards(self) -> list[int]:
        return sorted(set(range(self.index.shards)) - set(self.commits))

    def read(self, rows: np.ndarray | list[int], out: np.ndarray | None = None) -> np.ndarray:
        """Reads `rows` in the order given into [len(rows), *shape] of the array's dtype."""
        out = np.empty((len(rows), *self.shape), self.dtype) if out is None else out
        flat = out.reshape(len(rows), -1).view(np.uint8)
        for i, row in enumerate(rows):
            self._read_row(int(row), flat[i])
        return out

    def _read_row(self, row: int, out: np.ndarray) -> None:
        if row in self.dead:
            raise StoreError(f"{self.store}: {self.name} row {row} is a dead letter: {self.dead[row]}.")
        if not 0 <= row < self.index.count:
            raise StoreError(f"{self.store}: {self.name} has rows 0 to {self.index.count - 1}, not {row}.")
        shard, inner = divmod(row, self.index.shard_rows)
        mapped, table = self._shard(shard)
        offset, size = int(table[inner, 0]), int(table[inner, 1])
        if offset == MISSING or size != self.row_bytes + 4 or offset + size > len(mapped):
            raise self._damaged(shard, f"row {row} is missing")
        chunk = np.frombuffer(mapped, np.uint8, self.row_bytes, offset)
        (expected,) = struct.unpack_from("<I", mapped, offset + self.row_bytes)
        if google_crc32c.value(chunk) != expected:
            raise self._damaged(shard, f"row {row} fails its crc32c")
        np.copyto(out, chunk)

    def _shard(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        record = self.commits.get(shard)
        if record is None:
            raise StoreError(f"{self.store}: {self.name} shard {shard} is not committed; run the extraction again.")
        file = shard_file(self.store, self.name, shard, self._ndim)
        try:
            with file.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._damaged(shard, f"cannot be opened: {error}") from None
        if len(mapped) != record["bytes"]:
            raise self._damaged(shard, f"{len(mapped)} bytes instead of {record['bytes']}")
        footer = self.index.shard_rows * 16
        table_bytes = mapped[len(mapped) - footer - 4 : len(mapped) - 4]
        (expected,) = struct.unpack("<I", mapped[-4:])
        if google_crc32c.value(table_bytes) != expected:
            raise self._damaged(shard, "its shard index fails its crc32c")
        entry = mapped, np.frombuffer(table_bytes, "<u8").reshape(-1, 2)
        self._open[shard] = entry
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return entry

    def _damaged(self, shard: int, what: str) -> StoreError:
        file = shard_file(self.store, self.name, shard, self._ndim)
        return StoreError(
            f"{file} is damaged: {what}; run: xformer store verify {self.store} --repair, then extract again."
        )


class FeatureStore:
    """Opens a store for reading. Raises StoreError where there is none, or a newer one than this program knows."""

    def __init__(self, path: Path) -> None:
        if not (path / "zarr.json").is_file():
            raise StoreError(f"{path} is no feature store; make one with: xformer extract --store {path}")
        schema = zarr.open_group(path, mode="r").attrs.get("xformer_schema")
        if schema != SCHEMA:
            raise StoreError(f"{path} has schema {schema}; this program reads schema {SCHEMA}: upgrade xformer.")
        self.path, self.index = path, Index(path / "index")

    def array(self, name: str) -> FeatureArray:
        return FeatureArray(self.path, name, self.index)

    def complete(self, name: str) -> FeatureArray:
        """An array with every shard committed. Raises StoreError where some are missing."""
        array = self.array(name)
        if missing := array.missing_shards:
            raise StoreError(
                f"{self.path}: {name} has {self.index.shards - len(missing)} of {self.index.shards} shards; run the same "
                "extraction again to finish it."
            )
        return array

    def names(self) -> list[str]:
        return array_names(self.path)


def array_names(store: Path) -> list[str]:
    """The feature arrays of a store, by name; the index is not one."""
    return sorted(
        file.parent.relative_to(store).as_posix()
        for file in store.rglob("zarr.json")
        if file.parent.name != "index" and json.loads(file.read_text(encoding="utf-8")).get("node_type") == "array"
    )


def verify(store: Path, repair: bool = False) -> list[str]:
    """Compares every committed shard with its record; with `repair` withdraws the bad commits. Returns what is wrong."""
    opened, problems = FeatureStore(store), []
    for name in opened.names():
        ndim = len(zarr.open_array(store, path=name, mode="r").shape)
        for shard, record in sorted(committed(store, name).items()):
            file = shard_file(store, name, shard, ndim)
            content = file.read_bytes() if file.is_file() else b""
            if len(content) != record["bytes"] or hashlib.sha256(content).hexdigest() != record["sha256"]:
                problems.append(f"{file}: {len(content)} bytes do not match their commit record")
                if repair:
                    commit_file(store, name, shard).unlink()
                    file.unlink(missing_ok=True)
    return problems


def describe(store: Path) -> dict[str, Any]:
    """What a store holds: rows, arrays with shapes, bytes, shards, seconds of encoding, and dead letters."""
    opened = FeatureStore(store)
    arrays, dead = {}, {d["row"]: d for d in opened.index.dead()}
    for name in opened.names():
        array = opened.array(name)
        arrays[name] = {
            "shape": [opened.index.count, *array.shape],
            "dtype": str(array.dtype),
            "shards": f"{len(array.commits)}/{opened.index.shards}",
            "bytes": sum(record["bytes"] for record in array.commits.values()),
            "seconds": round(sum(record["seconds"] for record in array.commits.values()), 3),
            "usage": array.attributes["usage"],
        }
        for record in array.commits.values():
            dead |= {d["row"]: d for d in record["dead"]}
    return {"store": str(store), **opened.index.description, "dead": list(dead.values()), "arrays": arrays}
