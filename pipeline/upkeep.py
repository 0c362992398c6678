"""Looking after a store: what it holds, whether every byte is right, dead letters again, and what may go."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import commits, places, provenance
from pipeline.commits import committed
from pipeline.encode import crashed_file
from pipeline.index import ids_sha256
from pipeline.reader import array_metadata, shard_file
from pipeline.store import FeatureStore, array_names, describe, owner
from xformer.errors import StoreError


def verify(store: Path, repair: bool = False) -> list[str]:
    """Compares every committed shard with its record, and the record with index and array.

    With `repair` the bad commits are withdrawn, so that the next extraction makes exactly those shards again.
    Returns what is wrong, one line each. Raises StoreError for a damaged index, with which no row can be compared.
    """
    opened, problems = FeatureStore(store), []
    if damaged := opened.index.damaged():
        raise StoreError("; ".join(damaged))
    ids = dict(enumerate(map(ids_sha256, opened.index.ids())))
    for name in opened.names():
        (shape, _, about), bad = array_metadata(store, name), set()
        for shard, record in sorted(committed(store, name).items()):
            file = shard_file(store, name, shard, len(shape))
            try:
                content = places.read(file)
            except OSError:  # missing, or its disk does not give it: the other shards are checked all the same
                content = b""
            wrong = ""
            if len(content) != record["bytes"] or hashlib.sha256(content).hexdigest() != record["sha256"]:
                wrong = f"{len(content)} bytes do not match their commit record"
            elif record["ids_sha256"] != ids.get(shard) or record["rows"] != list(opened.index.bounds(shard)):
                wrong = "its commit record is of other rows than the index"
            elif record["fingerprint"] != about["fingerprint"]:
                wrong = "it was made by another encoder than the array says"
            if wrong:
                problems.append(f"{places.shown(file)}: {wrong}")
                bad.add(shard)
        if bad and repair:
            with owner(store):
                commits.withdraw(store, name, bad)
                for shard in bad:
                    places.remove(shard_file(store, name, shard, len(shape)))
    return problems


def seal(store: Path) -> None:
    """Folds the commit records of every finished array into one file."""
    shards = FeatureStore(store).index.shards
    for name in array_names(store):
        commits.seal(store, name, shards)


def info(store: Path) -> dict[str, Any]:
    """What a store holds and where it came from."""
    made = {
        kind: {key: value[key] for key in ("source", "images", "versions")}
        for kind, value in provenance.read(store).items()
    }
    return describe(store) | {"made": made}


def withdraw_dead(store: Path) -> tuple[int, list[str]]:
    """Withdraws every shard that holds a dead letter, so that the next extraction tries its images again.

    Rows that were dead when the store was planned stay dead, for their bytes were never hashed. Returns how many rows
    will be tried, and the encoders whose arrays they are in.
    """
    opened, rows, kinds = FeatureStore(store), set(), set()
    planned = {letter["row"] for letter in opened.index.dead()}
    with owner(store):
        places.remove(crashed_file(store))
        for name in opened.names():
            shards = set()
            for shard, record in committed(store, name).items():
                again = {letter["row"] for letter in record["dead"]} - planned
                if again:
                    rows |= again
                    shards.add(shard)
            if shards:
                commits.withdraw(store, name, shards)
                kinds.add("clip" if name.startswith("clip/") else "mae")
    return len(rows), sorted(kinds)


def drop(store: Path, names: list[str]) -> tuple[list[str], int]:
    """Removes arrays by name or by prefix (clip, mae, mae/draw-3) and what killed extractions left behind.

    Returns what went, and its bytes. Raises StoreError for a name that the store does not hold.
    """
    opened, gone, freed = FeatureStore(store), [], 0
    with owner(store):
        for wanted in names:
            found = [n for n in opened.names() if n == wanted or n.startswith(f"{wanted.rstrip('/')}/")]
            if not found:
                raise StoreError(f"{store} holds nothing called {wanted}; it holds {', '.join(opened.names())}.")
            for name in found:
                freed += sum(places.walk(store / name).values())
                places.remove_folder(store / name / "commits")  # first: a half-removed array has no readable row
                places.remove_folder(store / name)
                gone.append(name)
        for name in array_names(store):
            ndim = len(array_metadata(store, name)[0])
            keep = {shard_file(store, name, shard, ndim) for shard in committed(store, name)}
            for file, size in (places.walk(store / name / "c") | places.walk(store / name / "commits")).items():
                leftover = file not in keep if file.is_relative_to(store / name / "c") else file.name.startswith(".")
                if leftover:
                    freed += size
                    gone.append(file.relative_to(store).as_posix())
                    places.remove(file)
    return gone, freed


def rows_of(store: Path, ids: list[str]) -> np.ndarray:
    """The rows of image ids, int64. Raises StoreError for an id that is not there."""
    have = {value: row for row, value in enumerate(FeatureStore(store).index.column("id")["id"].to_pylist())}
    if unknown := [key for key in ids if key not in have]:
        raise StoreError(f"{store}: no image has the id {json.dumps(unknown[0])}.")
    return np.array([have[key] for key in ids], np.int64)
