"""Commit records: what makes a shard readable. One file per shard while an array is filled, one sealed file afterwards.

A finished array's records are folded into commits/sealed.parquet, because nine mask draws of 14 million images would
otherwise leave 300,000 small files; a reader takes only the columns that it needs. A loose record counts beside a sealed
one; both say the same.
"""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import places
from xformer.errors import StoreError

LETTER = pa.struct([("row", pa.int64()), ("id", pa.string()), ("source", pa.string()), ("reason", pa.string())])
RECORDS = pa.schema(
    [
        ("shard", pa.int64()),
        ("rows", pa.list_(pa.int64())),
        ("ids_sha256", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("fingerprint", pa.string()),
        ("seconds", pa.float64()),
        ("dead", pa.list_(LETTER)),
    ]
)
SEALED = "sealed.parquet"
AT_ONCE = 16  # loose records that are read from an object store at once


def commit_file(store: Path, name: str, shard: int) -> Path:
    return store / name / "commits" / f"{shard}.json"


def _loose_files(store: Path, name: str) -> list[Path]:
    folder = store / name / "commits"
    return [folder / file for file in places.children(folder)[0] if file[:-5].isdigit() and file.endswith(".json")]


def _loose(store: Path, name: str) -> list[dict]:
    def parse(file: Path) -> dict | None:
        try:
            return json.loads(places.read(file))
        except FileNotFoundError:
            return None  # sealed since it was listed; the sealed file is read after the loose ones
        except ValueError as error:
            raise StoreError(f"{file}: damaged commit record ({error}); remove it and extract again.") from None

    files = _loose_files(store, name)
    with ThreadPoolExecutor(AT_ONCE if places.is_object(store) else 1) as pool:
        return [record for record in pool.map(parse, files) if record is not None]


def _sealed(store: Path, name: str, columns: list[str] | None = None) -> pa.Table:
    file = store / name / "commits" / SEALED
    try:
        return pq.read_table(io.BytesIO(places.read(file)), columns=columns)
    except FileNotFoundError:
        return RECORDS.empty_table()
    except (pa.ArrowInvalid, OSError) as error:
        what = " ".join(str(error).split())
        raise StoreError(f"{file}: damaged commit records ({what}); remove it and extract again.") from None


def committed(store: Path, name: str) -> dict[int, dict]:
    """The commit records of an array by shard. Raises StoreError for a damaged one."""
    loose = _loose(store, name)
    return {record["shard"]: record for record in [*_sealed(store, name).to_pylist(), *loose]}


@dataclass
class Committed:
    """What a reader needs to know of an array's commits.

    bytes: int64 [shards], -1 = not committed; sha256: str [shards]; dead: int64, sorted rows; prints: fingerprints.
    """

    bytes: np.ndarray
    sha256: np.ndarray
    dead: np.ndarray
    prints: set[str]


def summary(store: Path, name: str, shards: int) -> Committed:
    loose = _loose(store, name)
    table = _sealed(store, name, ["shard", "bytes", "sha256", "fingerprint", "dead"])
    numbers, letters = table["shard"].to_numpy(), table["dead"].combine_chunks().flatten()
    found = Committed(
        np.full(shards, -1, np.int64),
        np.zeros(shards, "S64"),
        letters.field("row").to_numpy(zero_copy_only=False),
        set(table["fingerprint"].unique().to_pylist()),
    )
    found.bytes[numbers], found.sha256[numbers] = table["bytes"].to_numpy(), table["sha256"].to_pylist()
    for record in loose:
        found.bytes[record["shard"]], found.sha256[record["shard"]] = record["bytes"], record["sha256"]
        found.prints.add(record["fingerprint"])
    more = [letter["row"] for record in loose for letter in record["dead"]]
    found.dead = np.unique(np.concatenate([found.dead, np.array(more, np.int64)]).astype(np.int64))
    return found


def reasons(store: Path, name: str) -> dict[int, str]:
    """Why each dead row of an array is dead."""
    parts = [*_sealed(store, name, ["dead"]).to_pylist(), *_loose(store, name)]
    return {letter["row"]: letter["reason"] for part in parts for letter in part["dead"]}


def _write(store: Path, name: str, records: dict[int, dict]) -> None:
    table, content = pa.Table.from_pylist([records[shard] for shard in sorted(records)], RECORDS), io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    places.write(store / name / "commits" / SEALED, content.getvalue())


def seal(store: Path, name: str, shards: int) -> bool:
    """Folds the records of a finished array into one file; returns whether it is finished."""
    loose = _loose_files(store, name)
    if not loose:
        return places.exists(store / name / "commits" / SEALED)
    records: dict[int, Any] = committed(store, name)
    if len(records) < shards:
        return False
    _write(store, name, records)
    for file in loose:
        places.remove(file)
    return True


def withdraw(store: Path, name: str, shards: set[int]) -> None:
    """Takes back the commits of some shards: they are not readable any more and the next extraction makes them again."""
    if places.exists(store / name / "commits" / SEALED):
        records = committed(store, name)
        _write(store, name, {shard: record for shard, record in records.items() if shard not in shards})
    for shard in shards:
        places.remove(commit_file(store, name, shard))
