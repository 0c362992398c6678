"""`xformer store merge`: several partial stores of one corpus into one, by copying committed shards byte for byte.

Machines that share no file system extract into stores of their own (folders or s3://, in any combination), other
encoders, draws or shards of the same corpus.
What a store is copied from must have the same row order over the same image bytes, and arrays made in the same way; the
field that differs is named, and nothing is copied. A shard that the target has already is kept. Every copied shard is
compared with its commit record first, and its record is published last, so a killed merge is run again.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline import commits, encode, places, upkeep
from pipeline.reader import array_metadata, shard_file
from pipeline.store import (
    MADE,
    FeatureStore,
    array_names,
    clear_index,
    first_difference,
    owner,
    refuse_foreign,
    refuse_mixed,
)  # fmt: skip
from xformer.console import progress
from xformer.errors import StoreError


def merge(target: Path, sources: list[Path]) -> dict[str, Any]:
    """Copies into `target`, which may be new, every committed shard of `sources` that it lacks.

    Returns shards and bytes copied, shards kept, and what is still missing by array. Raises: StoreError where a source is
    no store, belongs to another corpus or encoder, or holds a damaged shard.
    """
    opened = [FeatureStore(source) for source in sources]
    if any(places.absolute(source) == places.absolute(target) for source in sources):
        raise StoreError(f"{places.shown(target)} cannot be merged into itself.")
    _refuse_mixed(sources)
    with owner(target):
        refuse_foreign(target)
        if not places.exists(target / "index/index.json"):
            _begin(target, sources[0])
        _refuse_mixed([target])
        for source in sources:
            _refuse_other(target, source)
        report: dict[str, Any] = {"store": places.shown(target), "copied": 0, "bytes": 0, "kept": 0}
        todo = [(s, name) for s in sources for name in array_names(s)]
        with progress(f"merge into {places.shown(target)}", len(todo) * opened[0].index.shards, "shards") as bar:
            for source, name in todo:
                _copy(target, source, name, report)
                bar.advance(opened[0].index.shards)
        for source in sources:
            if crashed := encode.crashed(source):
                encode.remember_crashers(target, crashed)
        upkeep.seal(target)
    whole = FeatureStore(target)
    report["missing"] = {n: len(left) for n in whole.names() if (left := whole.array(n).missing_shards)}
    return report


def _begin(target: Path, source: Path) -> None:
    """A new store with the source's row order; index.json comes last, it says that the index is whole."""
    clear_index(target)  # of a merge that did not get far
    files = sorted(places.walk(source / "index"), key=lambda file: (file.name == "index.json", file))
    for file in (source / "zarr.json", *files):
        places.copy(file, target / file.relative_to(source))


def _refuse_mixed(paths: list[Path]) -> None:
    for path in paths:
        index = FeatureStore(path).index
        for name in array_names(path):
            refuse_mixed(path, name, index)


def _refuse_other(target: Path, source: Path) -> None:
    """Raises StoreError where two stores do not belong together, before anything is copied."""
    have, want = (_index_of(path) for path in (target, source))
    if None in (have.get("rows_sha256"), want.get("rows_sha256")):  # an older store has none
        have, want = ({k: v for k, v in found.items() if k != "rows_sha256"} for found in (have, want))
    if difference := first_difference(have, want):
        said = difference.replace(" there ", " in the target ")
        raise StoreError(f"{places.shown(source)} has other rows than {places.shown(target)}: {said}.")
    for name in set(array_names(target)) & set(array_names(source)):
        have, want = (_made(path, name) for path in (target, source))
        if difference := first_difference(have, want):
            said = difference.replace(" there ", " in the target ")
            at, to = places.shown(source), places.shown(target)
            raise StoreError(f"{at}: {name} was made in another way than in {to}: {said}.")


def _index_of(path: Path) -> dict[str, Any]:
    """Corpus, number of rows and shards, and the hash of all image hashes; not the bytes of the Parquet file, which
    another version of its library writes in another way."""
    if damaged := FeatureStore(path).index.damaged():
        raise StoreError("; ".join(damaged))
    description = dict(FeatureStore(path).index.description)
    hashes = {f"images {k}": v for k, v in description.pop("sha256", {}).items() if k.startswith("c/")}
    return description.pop("corpus") | description | hashes


def _made(path: Path, name: str) -> dict[str, Any]:
    """Everything that must agree for two arrays to be one: identity, usage, int8 scales, and the Zarr metadata."""
    try:
        array_metadata(path, name)
        content = json.loads(places.read(path / name / "zarr.json"))
    except FileNotFoundError:
        at = places.shown(path)
        raise StoreError(f"{at}: {name}/zarr.json is lost; run: xformer store verify {at} --repair") from None
    attributes = content.pop("attributes")
    attributes.pop("rows_sha256", None)  # compared with each index; older arrays have none
    attributes.pop("fingerprint")  # of the identity, whose first field that differs says more
    return attributes.pop("identity") | attributes.pop("usage") | attributes | content


def _copy(target: Path, source: Path, name: str, report: dict[str, Any]) -> None:
    have, records = commits.committed(target, name), commits.committed(source, name)
    metadata = places.read(source / name / "zarr.json")
    if not places.exists(target / name / "zarr.json"):
        for folder in Path(name).parents:  # the groups above it, for any Zarr reader
            if places.exists(source / folder / "zarr.json") and not places.exists(target / folder / "zarr.json"):
                places.copy(source / folder / "zarr.json", target / folder / "zarr.json")
        places.write(target / name / "zarr.json", metadata)
    made = Path(name) / MADE
    if places.exists(source / made) and not places.exists(target / made):
        places.copy(source / made, target / made)
    ndim = len(json.loads(metadata)["shape"])
    for shard, record in sorted(records.items()):
        if shard in have:
            report["kept"] += 1
            continue
        file = shard_file(source, name, shard, ndim)
        try:
            content = places.read(file)
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            at = places.shown(source)
            raise StoreError(
                f"{places.shown(file)} is damaged; run: xformer store verify {at} --repair, then merge again."
            )
        places.write(shard_file(target, name, shard, ndim), content)
        commits.publish(target, name, record)
        report["copied"] += 1
        report["bytes"] += len(content)
