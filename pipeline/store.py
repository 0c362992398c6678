"""The feature store: one plain Zarr v3 group that any Zarr reader opens, and the exact, committed way in and out.

    store.zarr/index/{rows.parquet,captions.arrow,index.json}   the row order (pipeline/index.py)
    store.zarr/<array>/zarr.json                                e.g. clip/5/tokens, mae/draw-0/tokens, mae/draw-0/kept
    store.zarr/<array>/c/<shard>/...                            one shard = one unit of work, written once, whole
    store.zarr/<array>/commits/<shard>.json                     published last; readers see committed rows only;
                               sealed.json                      folded into one file when the array is finished

Inner chunk = one image, stored as raw bytes + crc32c. A missing row is an error, never zeros.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from pipeline.commits import commit_file, committed
from pipeline.index import Index, ids_sha256
from pipeline.reader import MISSING, FeatureArray, shard_file
from xformer import publish
from xformer.errors import StoreError

SCHEMA = 1

__all__ = ["MISSING", "FeatureArray", "FeatureStore", "commit_file", "committed", "shard_file"]


def fingerprint(identity: dict[str, Any]) -> str:
    """One hash of everything that decides a feature's value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def first_difference(have: dict[str, Any], want: dict[str, Any]) -> str | None:
    """The first field in which two identities differ, as text; None when they are the same."""
    for key in sorted(set(have) | set(want)):
        if have.get(key) != want.get(key):
            return f"{key} is {have.get(key)!r} there and {want.get(key)!r} here"
    return None


def first_misfit(trained: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first field in which features differ from those that a checkpoint was trained on; None where they fit.

    An imported checkpoint knows fewer fields. Exact values (fp16) fit one that was trained on their int8 approximation.
    """
    known = {key: value for key, value in found.items() if key in trained}
    exact = {"quantiser": "fp16"} if known.get("quantiser") == "fp16" else {}
    return first_difference(trained | exact, known)


@contextmanager
def owner(store: Path) -> Iterator[None]:
    """One writer per store, machine-wide. Raises StoreError at once where another one is at work."""
    with ExitStack() as held:
        try:
            mine = held.enter_context(publish.exclusive(store.parent / f".{store.name}.lock"))
        except OSError as error:
            raise StoreError(f"{store} cannot be written: {error.strerror}.") from None
        if not mine:
            raise StoreError(f"{store}: another extraction is writing it; wait for it or give another --store.")
        yield


def create_array(
    store: Path,
    name: str,
    index: Index,
    shape: tuple[int, ...],
    dtype: str,
    identity: dict,
    usage: dict,
    more: dict | None = None,
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
        attributes={"identity": identity, "usage": usage, "fingerprint": fingerprint(identity), **(more or {})},
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


def attributes(store: Path, name: str) -> dict[str, Any]:
    """The attributes of an array, read from its zarr.json; {} where there is no such array."""
    file = store / name / "zarr.json"
    return json.loads(file.read_text(encoding="utf-8"))["attributes"] if file.is_file() else {}


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
        if not (self.path / name / "zarr.json").is_file():
            have = ", ".join(array_names(self.path)) or "nothing yet"
            raise StoreError(f"{self.path} has no array {name} (it holds {have}); extract it first.")
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


def describe(store: Path) -> dict[str, Any]:
    """What a store holds: rows, arrays with bytes, shards, seconds of encoding; dead letters."""
    opened = FeatureStore(store)
    arrays, dead = {}, {d["row"]: d for d in opened.index.dead()}
    for name in opened.names():
        array, records = opened.array(name), committed(store, name)
        arrays[name] = {
            "shape": [opened.index.count, *array.shape],
            "dtype": str(array.dtype),
            "shards": f"{len(records)}/{opened.index.shards}",
            "bytes": sum(record["bytes"] for record in records.values()),
            "seconds": round(sum(record["seconds"] for record in records.values()), 3),
            "identity": array.attributes["identity"],
            "usage": array.attributes["usage"],
        }
        for record in records.values():
            dead |= {d["row"]: d for d in record["dead"]}
    return {"store": str(store), **opened.index.description, "dead": list(dead.values()), "arrays": arrays}
