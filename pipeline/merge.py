"""`xformer store merge`: several partial stores of one corpus into one, by copying committed shards byte for byte.

Machines that share no file system extract into stores of their own, other encoders, draws or shards of the same corpus.
What a store is copied from must have the same row order over the same image bytes, and arrays made in the same way; the
field that differs is named, and nothing is copied. A shard that the target has already is kept. Every copied shard is
compared with its commit record first, and its record is published last, so a killed merge is run again.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pipeline import commits, encode, places, upkeep
from pipeline.reader import shard_file
from pipeline.store import FeatureStore, array_names, first_difference, owner
from xformer import publish
from xformer.console import progress
from xformer.errors import StoreError


def merge(target: Path, sources: list[Path]) -> dict[str, Any]:
    """Copies into `target`, which may be new, every committed shard of `sources` that it lacks.

    Returns shards and bytes copied, shards kept, and what is still missing by array. Raises: StoreError where a source is
    no store, belongs to another corpus or encoder, or holds a damaged shard.
    """
    if any(places.is_object(place) for place in (target, *sources)):
        raise StoreError("merge copies between stores of this machine's file systems; copy those of s3:// here first.")
    opened = [FeatureStore(source) for source in sources]
    if any(source.resolve() == target.resolve() for source in sources):
        raise StoreError(f"{target} cannot be merged into itself.")
    with owner(target):
        if not (target / "index/index.json").is_file():
            _begin(target, sources[0])
        for source in sources:
            _refuse_other(target, source)
        report: dict[str, Any] = {"store": str(target), "copied": 0, "bytes": 0, "kept": 0}
        todo = [(s, name) for s in sources for name in array_names(s)]
        with progress(f"merge into {target}", len(todo) * opened[0].index.shards, "shards") as bar:
            for source, name in todo:
                _copy(target, source, name, report)
                bar.advance(opened[0].index.shards)
        for source in sources:
            _provenance(target, source)
        upkeep.seal(target)
    whole = FeatureStore(target)
    report["missing"] = {n: len(left) for n in whole.names() if (left := whole.array(n).missing_shards)}
    return report


def _begin(target: Path, source: Path) -> None:
    """A new store with the source's row order."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target / "index", ignore_errors=True)  # of a merge that did not get far
    with publish.directory(target / "index") as partial:
        shutil.copytree(source / "index", partial, dirs_exist_ok=True)
    publish.write_bytes(target / "zarr.json", (source / "zarr.json").read_bytes())


def _refuse_other(target: Path, source: Path) -> None:
    """Raises StoreError where two stores do not belong together, before anything is copied."""
    have, want = (_index_of(path) for path in (target, source))
    if difference := first_difference(have, want):
        raise StoreError(f"{source} has other rows than {target}: {difference}.".replace(" there ", " in the target "))
    for name in set(array_names(target)) & set(array_names(source)):
        have, want = (_made(path, name) for path in (target, source))
        if difference := first_difference(have, want):
            said = difference.replace(" there ", " in the target ")
            raise StoreError(f"{source}: {name} was made in another way than in {target}: {said}.")


def _index_of(path: Path) -> dict[str, Any]:
    """Corpus, number of rows and shards, and the hash of all image hashes; not the bytes of the Parquet file, which
    another version of its library writes in another way."""
    if damaged := FeatureStore(path).index.damaged():
        raise StoreError("; ".join(damaged))
    description = json.loads((path / "index/index.json").read_text(encoding="utf-8"))
    hashes = {f"images {k}": v for k, v in description.pop("sha256", {}).items() if k.startswith("c/")}
    return description.pop("corpus") | description | hashes


def _made(path: Path, name: str) -> dict[str, Any]:
    """Everything that must agree for two arrays to be one: identity, usage, int8 scales, and the Zarr metadata."""
    content = json.loads((path / name / "zarr.json").read_text(encoding="utf-8"))
    attributes = content.pop("attributes")
    attributes.pop("fingerprint")  # of the identity, whose first field that differs says more
    return attributes.pop("identity") | attributes.pop("usage") | attributes | content


def _copy(target: Path, source: Path, name: str, report: dict[str, Any]) -> None:
    have, records = commits.committed(target, name), commits.committed(source, name)
    metadata = (source / name / "zarr.json").read_bytes()
    if not (target / name / "zarr.json").is_file():
        for folder in Path(name).parents:  # the groups above it, for any Zarr reader
            if (group := source / folder / "zarr.json").is_file() and not (target / folder / "zarr.json").is_file():
                publish.write_bytes(target / folder / "zarr.json", group.read_bytes())
        publish.write_bytes(target / name / "zarr.json", metadata)
    ndim = len(json.loads(metadata)["shape"])
    for shard, record in sorted(records.items()):
        if shard in have:
            report["kept"] += 1
            continue
        file = shard_file(source, name, shard, ndim)
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            raise StoreError(f"{file} is damaged; run: xformer store verify {source} --repair, then merge again.")
        publish.write_bytes(shard_file(target, name, shard, ndim), content)
        publish.write_exclusive(commits.commit_file(target, name, shard), (json.dumps(record) + "\n").encode())
        report["copied"] += 1
        report["bytes"] += len(content)


def _provenance(target: Path, source: Path) -> None:
    """How each encoder's features were made, and the images that crashed an encoding process."""
    for file in (source / "index").glob("made-*.json"):
        if not (target / "index" / file.name).is_file():
            publish.write_bytes(target / "index" / file.name, file.read_bytes())
    if crashed := encode.crashed(source):
        publish.write_json(encode.crashed_file(target), crashed | encode.crashed(target))
