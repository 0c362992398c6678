"""Whether the pictures that a store was planned over still are what they were."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import places, provenance
from pipeline.encode import planned_image
from pipeline.images import BadImage
from pipeline.index import Index
from pipeline.store import FeatureStore, array_names
from xformer.console import progress, say
from xformer.errors import StoreError

SAMPLE_SHARDS, SAMPLE = 16, 256  # images that a rerun compares with the index, from so many shards
READERS = 8  # threads that read pictures


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
