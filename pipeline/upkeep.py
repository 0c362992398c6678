"""Looking after a store: what it holds, whether every byte is right, whether its pictures are, and what may go."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import commits, places, provenance
from pipeline.commits import committed
from pipeline.encode import planned_image
from pipeline.images import BadImage
from pipeline.index import Index, ids_sha256
from pipeline.reader import array_metadata, refuse_mixed, shard_file
from pipeline.store import MADE, FeatureStore, array_names, damaged_groups, describe, leftovers, owner, remove_array
from xformer.console import progress, say
from xformer.errors import StoreError

SAMPLE_SHARDS, SAMPLE = 16, 256  # images that a rerun compares with the index, from so many shards
READERS = 8  # threads that read pictures

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
    lost = [name for name in leftovers(path) if commits.any_record(path, name)]
    return [f"{places.shown(file)}: damaged or removed; it is always the same" for file in damaged] + [
        f"{places.shown(path / name)}: committed features without zarr.json and {MADE}; restore these from a copy of the "
        "store, or remove the folder"
        for name in lost
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


def changed(path: Path, images: Path | None = None) -> list[str]:
    """Reads every image that was planned and compares it with the index; returns those that differ, one line each.

    Raises StoreError where the pictures' folder is not there.
    """
    index = FeatureStore(path).index
    roots = {provenance.how(path, name, images)[1] for name in array_names(path)}
    if not roots:
        raise StoreError(f"{path} holds no features yet; extract some first.")
    found: list[str] = []
    with (
        progress(f"compare the pictures of {places.shown(path)}", index.count * len(roots), "images") as bar,
        ThreadPoolExecutor(READERS) as pool,
    ):
        for shard in range(index.shards):
            records = index.shard(shard)
            alive = [record for record in records if record["status"] != "dead"]
            for root in sorted(roots):
                found += filter(None, map("".join, pool.map(lambda record, root=root: _compared(root, record), alive)))
                bar.advance(len(records), note=f"{len(found)} differ" if found else "")
    return found


def check_sample(path: Path, index: Index, shards: list[int], root: Path, dead: dict[int, Any], most: float) -> None:
    """Raises StoreError where one of a few images of these shards is not what it was when the store was planned.

    One that cannot be read any more becomes a dead letter of what is made now, as in a first extraction; refused is only
    that more than twice `most` (corpus.max_dead_fraction; a sample scatters) of the sample is gone: then they lie elsewhere.
    The sample is the same each time: spread evenly, without dead rows.
    """
    gone, looked = [], 0
    shards = [shards[place * len(shards) // SAMPLE_SHARDS] for place in range(SAMPLE_SHARDS)] if shards else []
    shards = list(dict.fromkeys(shards))
    with ThreadPoolExecutor(READERS) as pool:
        for shard in shards:
            alive = [r for r in index.shard(shard) if r["status"] != "dead" and r["row"] not in dead]
            count = min(SAMPLE // len(shards), len(alive))
            chosen = [alive[place * len(alive) // count] for place in range(count)]
            for changed, missing in pool.map(lambda record: _compared(root, record), chosen):
                if changed:
                    raise StoreError(
                        f"{path} was planned over other pictures than lie in {root} now: {changed}; give another --store, "
                        f"or see all that differ: xformer store verify {path} --source"
                    )
                gone += [missing] if missing else []
            looked += count
    said = f"of {looked} pictures looked at, {len(gone)} cannot be read any more; the first: {next(iter(gone), '')}"
    if len(gone) > max(1, 2 * most * looked):
        raise StoreError(f"{path}: {said}; restore them in {root}, or raise corpus.max_dead_fraction to go on without.")
    if gone:
        say(f"{said}; such pictures become dead letters of what is made now")


def _compared(root: Path, record: dict) -> tuple[str, str]:
    """How a picture differs from the one that was planned, and why it cannot be read; "" where neither is so."""
    try:
        planned_image(root, record)
    except OSError as error:
        return "", f"{record['location']}: cannot be read: {error.strerror or error}"
    except BadImage as error:
        return f"{record['location']}: {error}", ""
    return "", ""


def seal(store: Path) -> None:
    """Folds the commit records of every finished array into one file."""
    shards = FeatureStore(store).index.shards
    for name in array_names(store):
        commits.seal(store, name, shards)


def info(store: Path) -> dict[str, Any]:
    """What a store holds and where it came from."""
    made = {}
    for name in array_names(store):
        try:
            said = provenance.read(store, name)
            made[name] = {key: said[key] for key in ("source", "images", "versions")}
        except StoreError as error:
            made[name] = {"damaged": str(error)}
    return describe(store) | {"made": made}


def drop(store: Path, names: list[str]) -> tuple[list[str], int]:
    """Removes arrays by name or by prefix (clip, mae, mae/draw-3) and what killed extractions left behind.

    What belongs together (tokens, their scales and kept patches) goes together. Returns what went, and its bytes.
    Raises StoreError for a name that the store does not hold.
    """
    opened, gone, freed = FeatureStore(store), [], 0
    with owner(store):
        for wanted in names:
            found = [n for n in opened.names() if n == wanted or n.startswith(f"{wanted.rstrip('/')}/")]
            if not found:
                raise StoreError(f"{store} holds nothing called {wanted}; it holds {', '.join(opened.names())}.")
            together = {name.rpartition("/")[0] for name in found} - {"pixels"}  # tokens, their scales and kept patches
            for name in opened.names():
                if name in found or name.rpartition("/")[0] in together:
                    freed += sum(places.walk(store / name).values())
                    remove_array(store, name)
                    gone.append(name)
        for name in leftovers(store):
            if not commits.any_record(store, name):  # else nobody removed it: verify tells
                freed += sum(places.walk(store / name).values())
                remove_array(store, name)
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
    rows = FeatureStore(store).index.find(ids)
    if unknown := [key for key, row in zip(ids, rows.tolist(), strict=True) if row < 0]:
        raise StoreError(f"{store}: no image has the id {json.dumps(unknown[0])}.")
    return rows
