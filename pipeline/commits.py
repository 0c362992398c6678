"""Commit records: what makes a shard readable. One file per shard while an array is filled, one sealed file afterwards.

A finished array's records are folded into commits/sealed.parquet, because nine mask draws of 14 million images would
otherwise leave 300,000 small files; a reader takes only the columns that it needs. A loose record that stands beside a
sealed one is the newer: a shard was made again. Whatever is damaged is found: a loose record carries a hash of itself, and
so does the sealed file, of which there is a copy (sealed.copy.parquet, written first) from which verify restores it.
"""

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import places
from pipeline.index import ids_sha256
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
SEALED, COPY = "sealed.parquet", "sealed.copy.parquet"
MARK, BLANK = b"sha256-of-this-file-with-zeros-here:", b"0" * 64
AT_ONCE = 16  # loose records that are read from an object store at once


def commit_file(store: Path, name: str, shard: int) -> Path:
    return store / name / "commits" / f"{shard}.json"


def compose(
    shard: int,
    rows: tuple[int, int],
    ids: list[str],
    content: bytes | memoryview,
    fingerprint: str,
    seconds: float,
    dead: list[dict],
) -> dict:
    """The commit record of a shard file's bytes."""
    return {
        "shard": shard,
        "rows": list(rows),
        "ids_sha256": ids_sha256(ids),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "fingerprint": fingerprint,
        "seconds": round(seconds, 3),
        "dead": dead,
    }


def publish(store: Path, name: str, record: dict, exclusive: bool = True) -> bool:
    """Writes a loose record; returns False where there is one already and it must be `exclusive`."""
    file = commit_file(store, name, record["shard"])
    content = (json.dumps(record | {"check": _check(record)}) + "\n").encode()
    if exclusive:
        return places.write_exclusive(file, content)
    places.write(file, content)
    return True


def exists(store: Path, name: str, shard: int) -> bool:
    """Whether a shard is committed. Only finished arrays are sealed, and a sealed array stays finished."""
    return any(map(places.exists, (commit_file(store, name, shard), store / name / "commits" / SEALED)))


def _check(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _parsed(store: Path, file: Path) -> dict:
    try:
        record = json.loads(places.read(file))
        if record.pop("check") == _check(record) and file.stem == str(record["shard"]):
            return record
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise StoreError(f"{file}: damaged commit record; run: xformer store verify {store} --repair")


def _loose_files(store: Path, name: str) -> list[Path]:
    folder = store / name / "commits"
    return [folder / file for file in places.children(folder)[0] if file[:-5].isdigit() and file.endswith(".json")]


def _loose(store: Path, name: str, damaged: list[Path] | None = None) -> list[dict]:
    def parse(file: Path) -> dict | None:
        try:
            return _parsed(store, file)
        except FileNotFoundError:
            return None  # sealed since it was listed; the sealed file is read after the loose ones
        except StoreError:
            if damaged is None:
                raise
            damaged.append(file)
            return None

    files = _loose_files(store, name)
    with ThreadPoolExecutor(AT_ONCE if places.is_object(store) else 1) as pool:
        return [record for record in pool.map(parse, files) if record is not None]


def damaged(store: Path, name: str) -> list[int]:
    """The shards whose loose record cannot be read."""
    files: list[Path] = []
    _loose(store, name, files)
    return [int(file.stem) for file in files]


def any_record(store: Path, name: str) -> bool:
    """Whether an array has a commit record of any kind, readable or not."""
    sealed = (places.exists(store / name / "commits" / part) for part in (SEALED, COPY))
    return any(sealed) or bool(_loose_files(store, name))


def _intact(content: bytes) -> bool:
    at = content.rfind(MARK) + len(MARK)
    digest = hashlib.sha256(content[:at])
    digest.update(BLANK + content[at + len(BLANK) :])
    return content[at : at + len(BLANK)] == digest.hexdigest().encode()


def _sealed(store: Path, name: str, columns: list[str] | None = None) -> pa.Table:
    for part in (SEALED, COPY):  # the copy alone: sealing was killed between the two, or the file was removed
        try:
            content = places.read(store / name / "commits" / part)
        except FileNotFoundError:
            continue
        except OSError:
            content = b""
        if not _intact(content):
            file = store / name / "commits" / part
            raise StoreError(f"{file}: damaged commit records; run: xformer store verify {store} --repair")
        # in this thread alone: one of Arrow's that still lets go of a Python object when the interpreter ends aborts it
        return pq.ParquetFile(pa.BufferReader(content)).read(columns, use_threads=False)
    return RECORDS.empty_table()


def committed(store: Path, name: str, damaged: list[Path] | None = None) -> dict[int, dict]:
    """The commit records of an array by shard.

    Raises StoreError for a damaged one; `damaged` takes the files of damaged loose ones instead.
    """
    loose = _loose(store, name, damaged)
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
    """Raises StoreError for a damaged record, and for one of a shard that the array does not have."""
    loose = _loose(store, name)
    table = _older(_sealed(store, name, ["shard", "bytes", "sha256", "fingerprint", "dead"]), loose)
    numbers, letters = table["shard"].to_numpy(), table["dead"].combine_chunks().flatten()
    if odd := [number for number in [*numbers.tolist(), *(r["shard"] for r in loose)] if not 0 <= number < shards]:
        raise StoreError(f"{store}: {name} has a commit record of shard {odd[0]}, but only {shards} shards.")
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


def _older(table: pa.Table, loose: list[dict]) -> pa.Table:
    """The sealed records that no loose one replaces."""
    newer = np.isin(table["shard"].to_numpy(), [record["shard"] for record in loose])
    return table.filter(pa.array(~newer)) if loose else table


def reasons(store: Path, name: str) -> dict[int, str]:
    """Why each dead row of an array is dead."""
    loose = _loose(store, name)
    parts = [*_older(_sealed(store, name, ["shard", "dead"]), loose).to_pylist(), *loose]
    return {letter["row"]: letter["reason"] for part in parts for letter in part["dead"]}


def _write(store: Path, name: str, records: dict[int, dict]) -> None:
    table, content = pa.Table.from_pylist([records[shard] for shard in sorted(records)], RECORDS), io.BytesIO()
    with pq.ParquetWriter(content, RECORDS, compression="zstd") as file:
        file.write_table(table)
        file.add_key_value_metadata({"check": (MARK + BLANK).decode()})
    whole = content.getvalue()
    at, digest = whole.rindex(MARK) + len(MARK), hashlib.sha256(whole).hexdigest().encode()
    for part in (COPY, SEALED):
        places.write(store / name / "commits" / part, whole[:at] + digest + whole[at + len(BLANK) :])


def seal(store: Path, name: str, shards: int) -> bool:
    """Folds the records of a finished array into one file; returns whether it is finished, and all can be read."""
    loose = _loose_files(store, name)
    if not loose:
        return places.exists(store / name / "commits" / SEALED)
    unreadable: list[Path] = []
    records = committed(store, name, unreadable)
    if unreadable or len(records) < shards:
        return False
    _write(store, name, records)
    for file in loose:
        places.remove(file)
    return True


def mend(store: Path, name: str, write: bool) -> list[str]:
    """What is wrong with the sealed records and their copy, one line each; with `write` the one restores the other."""
    found: dict[Path, bytes | None] = {}
    for file in (store / name / "commits" / part for part in (SEALED, COPY)):
        try:
            content = places.read(file)
            found[file] = content if _intact(content) else b""
        except FileNotFoundError:
            found[file] = None
        except OSError:
            found[file] = b""
    good = next(filter(None, found.values()), None)
    sealing = bool(_loose_files(store, name))  # it may have been interrupted: one is not there yet, or the older one
    wrong = [file for file, content in found.items() if content != good and not (sealing and content != b"")]
    if wrong and good is None:
        return [
            f"{places.shown(wrong[0])}: the commit records and their copy are damaged, so {name} can be neither read nor "
            f"checked; restore one of both, or run: xformer store gc {places.shown(store)} --drop {name}, and extract it "
            "again"
        ]
    if write and good:
        for file in wrong:
            places.write(file, good)
    return [f"{places.shown(file)}: damaged or removed; the other copy of it is whole" for file in wrong]
