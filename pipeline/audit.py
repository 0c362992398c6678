"""Whether every byte of a store is what was committed, what is lacking, and small files restored from their copies."""

import hashlib
from pathlib import Path

from pipeline import commits, places, provenance
from pipeline.commits import committed
from pipeline.index import Index, ids_sha256
from pipeline.reader import array_metadata, refuse_mixed, shard_file
from pipeline.store import MADE, FeatureStore, array_names, damaged_groups, lost_features
from xformer.console import progress
from xformer.errors import StoreError

Shards = dict[str, set[int]]  # by array


def verify(store: Path) -> list[str]:
    """Compares every committed shard with its record, the record with index and array, and the records with their copy.

    Returns what is wrong, one line each. Raises StoreError for a damaged index, with which no row can be compared.
    """
    return check(store)[0]


def check(path: Path, only: Shards | None = None) -> tuple[list[str], Shards]:
    """The same, and the shards that are damaged. `only` these are looked at, and each must be there."""
    opened, problems, bad = FeatureStore(path), _groups(path, write=False) if only is None else [], {}
    if damaged := opened.index.damaged():
        raise StoreError("; ".join(damaged))
    index, names = opened.index, opened.names() if only is None else sorted(only)
    ids = dict(enumerate(map(ids_sha256, index.ids())))
    total = len(names) * index.shards if only is None else sum(map(len, only.values()))
    with progress(f"verify {places.shown(path)}", total, "shards") as bar:
        told = {name: _mend(path, name, write=False) for name in names}
        for name in names:
            if not told[name]:
                refuse_mixed(path, name, index)  # its shards would all look damaged
        for name in names:
            problems += told[name]
            unreadable: list[Path] = []
            try:
                (shape, _, about), records = array_metadata(path, name), committed(path, name, unreadable)
            except (StoreError, FileNotFoundError):
                continue  # told already
            records |= {int(file.stem): {} for file in unreadable}
            shards = set(records) if only is None else only[name]
            if beyond := sorted(shard for shard in shards if not 0 <= shard < index.shards):
                more = "which it does not have; remove that record"
                problems += [f"{places.shown(path)}: {name} has a commit record of shard {s}, {more}" for s in beyond]
            for shard in sorted(shards - {*beyond}):
                file = shard_file(path, name, shard, len(shape))
                want = {"rows": list(index.bounds(shard)), "ids_sha256": ids.get(shard)}
                if wrong := _wrong(file, records.get(shard, {}), want, about["fingerprint"]):
                    problems.append(f"{places.shown(file)}: {wrong}")
                    bad.setdefault(name, set()).add(shard)
                bar.advance()
            bar.advance(index.shards - len(shards) if only is None else 0)
    return problems, bad


def _wrong(file: Path, record: dict, want: dict, fingerprint: str) -> str:
    if not record:
        return "its commit record cannot be read"
    try:
        content = places.read(file)
    except OSError as error:
        return f"cannot be read: {error.strerror or 'there is no such object'}"
    if len(content) != record["bytes"] or hashlib.sha256(content).hexdigest() != record["sha256"]:
        return f"{len(content)} bytes do not match their commit record"
    if {key: record[key] for key in want} != want:
        return "its commit record is of other rows than the index"
    return "" if record["fingerprint"] == fingerprint else "it was made by another encoder than the array says"


def _mend(path: Path, name: str, write: bool) -> list[str]:
    """What is wrong with an array's metadata and sealed records; with `write` their copies replace them."""
    problems, made = commits.mend(path, name, write), {}
    try:
        made = provenance.read(path, name)
    except StoreError as error:
        problems.append(str(error))
    file = path / name / "zarr.json"
    try:
        array_metadata(path, name)
        same = not made or places.read(file) == made["zarr.json"].encode()
    except (StoreError, FileNotFoundError):
        same = False
    if not same:
        copy = f"{MADE} holds a copy" if made else "restore it from a copy of the store"
        problems.append(f"{places.shown(file)}: damaged or removed; {copy}")
        if write and made:
            places.write(file, made["zarr.json"].encode())
    return problems


def _groups(path: Path, write: bool) -> list[str]:
    """What is wrong with the files around the arrays; with `write` the groups' own, which are always the same, are
    written again."""
    damaged = damaged_groups(path)
    for file, content in damaged.items() if write else ():
        places.write(file, content)
    return [f"{places.shown(file)}: damaged or removed; it is always the same" for file in damaged] + [
        f"{places.shown(path / name)}: committed features without zarr.json and {MADE}; restore these from a copy of the "
        "store, or remove the folder"
        for name in lost_features(path)
    ]


def mend(path: Path) -> list[str]:
    """Restores the small files of a store that are damaged from their copies; returns which."""
    Index(path / "index")  # refuses a damaged one before anything is written
    lines = _groups(path, write=True)
    return lines + [line for name in array_names(path) for line in _mend(path, name, write=True)]


def unfinished(path: Path) -> list[str]:
    """Which arrays lack shards, one line each."""
    whole = FeatureStore(path)
    missing = {name: len(whole.array(name).missing_shards) for name in whole.names()}
    shards = whole.index.shards
    return [f"{name} has {shards - count} of {shards} shards" for name, count in missing.items() if count]
