"""The feature store: one plain Zarr v3 group that any Zarr reader opens, and the exact, committed way in and out.

    store.zarr/index/{rows.parquet,captions.arrow,index.json}   the row order (pipeline/index.py)
    store.zarr/<array>/zarr.json                                e.g. clip/5/tokens, mae/draw-0/tokens, mae/draw-0/kept
    store.zarr/<array>/made.json                                where it came from, by which it is made again
    store.zarr/<array>/c/<shard>/...                            one shard = one unit of work, written once, whole
    store.zarr/<array>/commits/<shard>.json                     published last; readers see committed rows only;
                               sealed.parquet                   folded into one file when the array is finished

Inner chunk = one image, stored as raw bytes + crc32c. A missing row is an error, never zeros. A store lies in a folder
or, with the same files as objects, under s3://bucket/prefix (pipeline/places.py).
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from awscrt.checksums import crc32c

from pipeline import commits, objects, places
from pipeline.cache import LocalCache
from pipeline.commits import commit_file, committed
from pipeline.index import Index
from pipeline.places import absolute
from pipeline.reader import MISSING, FeatureArray, array_metadata, fingerprint, refuse_mixed, shard_file
from xformer import publish
from xformer.errors import StoreError

SCHEMA = 2  # 2: commit records carry a hash of themselves, arrays their own provenance
MADE = "made.json"  # beside an array's zarr.json: how it was made (pipeline/provenance.py)

__all__ = [
    "MISSING", "FeatureArray", "FeatureStore", "LocalCache", "absolute", "commit_file", "committed", "fingerprint",
    "refuse_mixed", "shard_file",
]  # fmt: skip


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
    """One writer per store, by whatever link it is called: a lock on this machine, in an object store a lease.

    Raises StoreError at once where another one is at work.
    """
    with ExitStack() as held:
        try:
            real = absolute(store)
            lock = real.parent / f".{real.name}.lock"
            guard = objects.lease(store) if places.is_object(store) else publish.exclusive(lock)
            mine = held.enter_context(guard)
        except (FileExistsError, NotADirectoryError):
            raise StoreError(f"{store} cannot be written: {store.parent} is not a folder.") from None
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
    """Declares an array before it is filled; returns whether it is new. One without a committed shard is replaced.

    Raises: StoreError where it exists and was made in another way; the field that differs is named.
    """
    import zarr  # who only reads does without it
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    create_group(store)
    rows = index.description.get("rows_sha256")
    if have := attributes(store, name):
        wanted = json.loads(json.dumps({"identity": identity, "usage": usage}))
        differences = (first_difference(have.get(part, {}), wanted[part]) for part in wanted)
        difference = next(filter(None, differences), None)
        if not difference:
            return False
        if committed(store, name):
            raise StoreError(
                f"{places.shown(store)}: {name} was made in another way: {difference}; give another --store, or the "
                "settings it was made with."
            )
        remove_array(store, name)
    files: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(files),
        name=name,
        shape=(index.count, *shape),
        chunks=(1, *shape),
        shards=(index.shard_rows, *shape),
        dtype=dtype,
        compressors=[Crc32cCodec()],
        fill_value=float("nan") if dtype.startswith("float") else 0,
        attributes={"identity": identity, "usage": usage, "fingerprint": fingerprint(identity), **(more or {})}
        | ({"rows_sha256": rows} if rows else {}),
    )
    _write_metadata(store, files)
    return True


def _refuse_schema(path: Path, schema: Any) -> None:
    if schema != SCHEMA:
        older = isinstance(schema, int) and schema < SCHEMA
        way_out = "extract into a new store" if older else "upgrade xformer"
        raise StoreError(f"{places.shown(path)} has schema {schema}; this program reads schema {SCHEMA}: {way_out}.")


def refuse_foreign(path: Path) -> None:
    """Raises StoreError where a place holds anything else than a feature store; what begins with a dot does not count."""
    files, folders = places.children(path)
    if not folders and all(name.startswith(".") or name == objects.LEASE_NAME for name in files):
        return
    if (schema := _schema(path)) is None:
        raise StoreError(f"{places.shown(path)} holds other files and is no feature store; give another one.")
    _refuse_schema(path, schema)


def clear_index(store: Path) -> None:
    """Removes what an unfinished planning left behind, and arrays without a commit: their rows are planned anew.

    Raises: StoreError where there are features, whose rows only the lost index knew; nothing is removed then.
    """
    if any(commits.any_record(store, name) for name, _ in _array_folders(store)):
        at = places.shown(store)
        raise StoreError(
            f"{at} has features but its index is lost: restore {at}/index from a copy, or extract into a new store."
        )
    for name in array_names(store):
        remove_array(store, name)
    places.remove_folder(store / "index")


def _schema(path: Path) -> Any:
    """The schema that a store's root group names; None where there is no store.

    Where that file is damaged or gone, an index and an array that says how it was made are a store of this schema.
    Raises StoreError where neither is there, for what is wrong with the file or with its place.
    """
    damaged = None
    try:
        return places.read_json(path / "zarr.json")["attributes"]["xformer_schema"]
    except StoreError as error:
        damaged = error
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError):
        pass
    whole = array_names(path) if places.exists(path / "index" / "index.json") else []
    if any(places.exists(path / name / MADE) for name in whole):
        return SCHEMA
    if damaged is not None:
        raise damaged
    return None


def create_group(store: Path) -> None:
    """The store's root group, unless it is there."""
    if not places.exists(store / "zarr.json"):
        places.write(store / "zarr.json", _group({"xformer_schema": SCHEMA}))


def _group(attributes: dict[str, Any]) -> bytes:
    """The zarr.json of a group."""
    import zarr
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    zarr.create_group(MemoryStore(files), zarr_format=3, attributes=attributes)
    return files["zarr.json"].to_bytes()


def damaged_groups(store: Path) -> dict[Path, bytes]:
    """The group files above a store's arrays that are missing or not what they were, and what they must hold."""
    found: dict[Path, bytes] = {}
    for folder in sorted({folder for name in array_names(store) for folder in Path(name).parents}):
        file, content = store / folder / "zarr.json", _group({} if folder.name else {"xformer_schema": SCHEMA})
        try:
            have, want = places.read_json(file), json.loads(content)
            if any(have.get(key) != value for key, value in want.items()):
                found[file] = content
        except (StoreError, FileNotFoundError):
            found[file] = content
    return found


def remove_array(store: Path, name: str) -> None:
    """Removes an array in an order in which it is always found again: first what makes its rows readable, last its name."""
    places.remove_folder(store / name / "commits")
    places.remove(store / name / MADE)
    places.remove_folder(store / name / "c")
    places.remove_folder(store / name)


def _write_metadata(store: Path, files: dict[str, Any]) -> None:
    """Writes zarr.json files that Zarr made in memory, outer groups first, each unless it is there."""
    for key in sorted(files, key=len):
        if not places.exists(store / key):
            places.write(store / key, files[key].to_bytes())


def shard_bytes(block: np.ndarray, shard_rows: int) -> memoryview:
    """A Zarr v3 shard (sharding_indexed, index at the end) of inner chunks of one row each, raw bytes + crc32c.

    Written here and not through Zarr so that a shard is one buffer: hashed, written or uploaded as it is.
    """
    rows, size = len(block), block[:1].nbytes
    table = np.full((shard_rows, 2), MISSING, "<u8")  # rows after the array's end are not stored
    table[:rows, 0], table[:rows, 1] = np.arange(rows) * (size + 4), size + 4
    shard = np.empty(rows * (size + 4) + table.nbytes + 4, np.uint8)
    body = shard[: rows * (size + 4)].reshape(rows, size + 4)
    body[:, :size] = np.ascontiguousarray(block).reshape(rows, -1).view(np.uint8)
    for row in body:
        row[size:] = _crc32c(row[:size])
    shard[body.size : -4], shard[-4:] = table.reshape(-1).view(np.uint8), _crc32c(table.reshape(-1).view(np.uint8))
    return shard.data


def _crc32c(content: np.ndarray) -> np.ndarray:
    return np.array([crc32c(content)], "<u4").view(np.uint8)  # type: ignore[arg-type]


def write_shard(
    store: Path,
    name: str,
    index: Index,
    shard: int,
    block: np.ndarray,
    ids: list[str],
    dead: list[dict],
    seconds: float,
    old: dict | None = None,
) -> None:
    """Writes one whole shard and publishes its commit record last. A shard that is committed stays as it is.

    Args:
        block: [rows, ...] of exactly the array's dtype and row shape; dead rows hold the fill value.
        old: the shard is made again in place of what has this commit record, or as much as is known of it. The new
            record is published over it after the new bytes; where both are the same, nothing is written.

    Raises: StoreError for a wrong shape or dtype, or a row with a value that is not finite and no dead letter.
    """
    if old is None and commits.exists(store, name, shard):
        return
    shape, dtype, about = array_metadata(store, name)
    start, stop = index.bounds(shard)
    if block.shape != (stop - start, *shape[1:]) or block.dtype != dtype or len(ids) != stop - start:
        raise StoreError(f"{name} shard {shard}: {block.dtype} {block.shape} does not fit {dtype} {shape}.")
    if block.dtype.kind == "f":
        alive = np.setdiff1d(np.arange(start, stop), [d["row"] for d in dead]) - start
        for row in alive:
            if not np.isfinite(block[row]).all():
                raise StoreError(f"{name} row {start + row}: a value is not finite and the row is not a dead letter.")
    content, file = shard_bytes(block, index.shard_rows), shard_file(store, name, shard, block.ndim)
    record = commits.compose(shard, (start, stop), ids, content, about["fingerprint"], seconds, dead)
    if old is None or not _holds(file, content):
        places.write(file, content)
    if old is None:
        if not commits.publish(store, name, record) and _holds(file, content):  # of two at once the later bytes count
            commits.publish(store, name, record, exclusive=False)
    elif {**old, "seconds": 0} != {**record, "seconds": 0}:
        commits.publish(store, name, record, exclusive=False)


def _holds(file: Path, content: memoryview) -> bool:
    try:
        return places.read(file) == content
    except OSError:
        return False


def attributes(store: Path, name: str) -> dict[str, Any]:
    """The attributes of an array, read from its zarr.json; {} where there is no such array."""
    try:
        return array_metadata(store, name)[2]
    except FileNotFoundError:
        return {}


class FeatureStore:
    """Opens a store for reading. Raises StoreError where there is none, or a newer one than this program knows.

    Args:
        cache: where rows of an object store are kept; a local store needs none.
    """

    def __init__(self, path: Path, cache: LocalCache | None = None) -> None:
        self.cache = cache or LocalCache()
        if (schema := _schema(path)) is None:
            raise StoreError(f"{path} is no feature store; make one with: xformer extract --store {path}")
        _refuse_schema(path, schema)
        self.path, self.index = path, Index(path / "index", self.cache)

    def array(self, name: str) -> FeatureArray:
        try:
            return FeatureArray(self.path, name, self.index, self.cache)
        except FileNotFoundError:
            have = ", ".join(self.names()) or "nothing yet"
            raise StoreError(f"{self.path} has no array {name} (it holds {have}); extract it first.") from None

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
    return [name for name, whole in _array_folders(store) if whole]


def leftovers(store: Path) -> list[str]:
    """Folders of shards or commits that belong to no array: of one that was being removed, or lost its metadata."""
    return [name for name, whole in _array_folders(store) if not whole]


def lost_features(store: Path) -> list[str]:
    """Those of them that hold committed features: what said how they are to be read is lost."""
    return [name for name in leftovers(store) if commits.any_record(store, name)]


def _array_folders(store: Path) -> list[tuple[str, bool]]:
    """Every folder with features, by name, and whether there is an array."""

    def is_array(folder: Path, files: list[str], filled: bool) -> bool:
        if MADE in files or "zarr.json" not in files:  # whatever its zarr.json says
            return MADE in files
        try:
            return places.read_json(folder / "zarr.json").get("node_type") == "array" or filled
        except StoreError:
            return filled  # an array's is told by verify, and a group's too

    def below(folder: Path) -> Iterator[tuple[str, bool]]:  # stops at an array: below it are thousands of shards
        files, folders = places.children(folder)
        filled = not {"c", "commits"}.isdisjoint(folders)
        if (whole := is_array(folder, files, filled)) or filled:
            yield folder.relative_to(store).as_posix(), whole
        else:
            for name in folders:
                yield from below(folder / name) if folder / name != store / "index" else ()

    return sorted(below(store))


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
    return {"store": places.shown(store), **opened.index.description, "dead": list(dead.values()), "arrays": arrays}
