"""Commit records: what makes a shard readable. One file per shard while an array is filled, one sealed file afterwards.

A finished array's records are folded into commits/sealed.json, columns of equal length, because nine mask draws of 14
million images would otherwise leave 300,000 small files. A loose record counts beside a sealed one; both say the same.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from xformer import publish
from xformer.errors import StoreError

FIELDS = ("shard", "rows", "ids_sha256", "bytes", "sha256", "fingerprint", "seconds")
SEALED = "sealed.json"


def commit_file(store: Path, name: str, shard: int) -> Path:
    return store / name / "commits" / f"{shard}.json"


def _parse(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{file}: damaged commit record ({error}); remove it and extract again.") from None


def _sealed(store: Path, name: str) -> dict[str, Any]:
    file = store / name / "commits" / SEALED
    return _parse(file) if file.is_file() else {field: [] for field in FIELDS} | {"dead": []}


def committed(store: Path, name: str) -> dict[int, dict]:
    """The commit records of an array by shard. Raises StoreError for a damaged one."""
    columns = _sealed(store, name)
    found = {}
    for values in zip(*(columns[field] for field in FIELDS), strict=True):
        found[values[0]] = dict(zip(FIELDS, values, strict=True)) | {"dead": []}
    for letter in columns["dead"]:
        found[letter["shard"]]["dead"].append({k: v for k, v in letter.items() if k != "shard"})
    folder = store / name / "commits"
    for file in folder.glob("[0-9]*.json") if folder.is_dir() else ():
        found[int(file.stem)] = _parse(file)
    return found


def sizes(store: Path, name: str, shards: int) -> tuple[np.ndarray, dict[int, str], set[str]]:
    """What a reader needs: each shard's bytes (int64 [shards], -1 = not committed), dead rows, and the fingerprints."""
    columns = _sealed(store, name)
    found = np.full(shards, -1, np.int64)
    found[np.array(columns["shard"], np.int64)] = columns["bytes"]
    dead = {letter["row"]: letter["reason"] for letter in columns["dead"]}
    prints = set(columns["fingerprint"])
    folder = store / name / "commits"
    for file in folder.glob("[0-9]*.json") if folder.is_dir() else ():
        record = _parse(file)
        found[record["shard"]] = record["bytes"]
        dead |= {letter["row"]: letter["reason"] for letter in record["dead"]}
        prints.add(record["fingerprint"])
    return found, dead, prints


def _write(store: Path, name: str, records: dict[int, dict]) -> None:
    ordered = [records[shard] for shard in sorted(records)]
    columns: dict[str, Any] = {field: [record[field] for record in ordered] for field in FIELDS}
    columns["dead"] = [letter | {"shard": record["shard"]} for record in ordered for letter in record["dead"]]
    publish.write_bytes(store / name / "commits" / SEALED, (json.dumps(columns) + "\n").encode())


def seal(store: Path, name: str, shards: int) -> bool:
    """Folds the records of a finished array into one file; returns whether it is finished."""
    folder = store / name / "commits"
    loose = list(folder.glob("[0-9]*.json")) if folder.is_dir() else []
    if not loose:
        return (folder / SEALED).is_file()
    records = committed(store, name)
    if len(records) < shards:
        return False
    _write(store, name, records)
    for file in loose:
        file.unlink()
    return True


def withdraw(store: Path, name: str, shards: set[int]) -> None:
    """Takes back the commits of some shards: they are not readable any more and the next extraction makes them again."""
    if (store / name / "commits" / SEALED).is_file():
        records = committed(store, name)
        _write(store, name, {shard: record for shard, record in records.items() if shard not in shards})
    for shard in shards:
        commit_file(store, name, shard).unlink(missing_ok=True)
