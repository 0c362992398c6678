"""Looking after a store: what it holds, what of its records folds into one file, and what may go."""

from pathlib import Path
from typing import Any

from pipeline import commits, places, provenance
from pipeline.commits import committed
from pipeline.reader import array_metadata, shard_file
from pipeline.store import FeatureStore, array_names, describe, leftovers, lost_features, owner, remove_array
from xformer.errors import StoreError


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
        for name in sorted({*leftovers(store)} - {*lost_features(store)}):  # nobody removed the latter: verify tells
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
