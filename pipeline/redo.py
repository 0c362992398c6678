"""Making committed shards again: those that are damaged, and those with dead letters whose cause may be gone.

Only what is asked for is made, by what each array's made.json says, the index and the pictures: the corpus's own files
are not needed. An old commit stays valid until the new bytes are there, so whatever interrupts this, nothing is lost.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import audit, cluster, encode, places, provenance, sources, upkeep
from pipeline.adopt import Siblings, adopt
from pipeline.audit import Shards
from pipeline.commits import committed
from pipeline.extract import check_gpus, identity
from pipeline.images import BadImage, decode
from pipeline.index import Index
from pipeline.store import FeatureStore, attributes, describe, first_difference, owner
from xformer.console import progress
from xformer.errors import StoreError


def redo(
    path: Path,
    wanted: Shards,
    images: Path | None = None,
    workers: int | None = None,
    gpus: bool = False,
    scheduler: str | None = None,
    in_process: bool = False,
) -> list[str]:
    """Makes exactly these committed shards again; arrays with equal settings in one pass. The caller owns the store.

    What belongs together (tokens, their scales and kept patches) is made together, and written where it differs.

    Args:
        images: where the pictures lie now; left out, where they lay.

    Returns: why a shard was left as it is, one line each: a picture that is alive in it cannot be used any more, or its
    array does not say how it was made. Raises: StoreError where pictures are gone or an encoder is another, before
    anything is made.
    """
    check_gpus(gpus, scheduler)
    siblings, left = Siblings(path), []
    passes: dict[cluster.Job, tuple[int, cluster.Todo]] = {}
    for name, shards in _whole(siblings, wanted).items():
        try:
            provenance.read(path, name)
        except StoreError as error:
            left.append(str(error))
            continue
        settings, root = provenance.how(path, name, images)
        have, want = attributes(path, name)["identity"], json.loads(json.dumps(identity(name, settings)))
        if difference := first_difference(have, want):
            raise StoreError(
                f"{path}: {name} was made by another encoder than is here now: {difference}; nothing was changed."
            )
        job = cluster.Job(str(places.absolute(path)), settings.model_dump_json(), str(root), gpus)
        todo = passes.setdefault(job, (settings.store.workers, {}))[1]
        records = siblings.records(name)
        for shard in shards:
            arrays, _, old = todo.setdefault(shard, ([], [], {}))
            arrays.append(name)
            old[name] = records.get(shard) or {"dead": siblings.known_dead(name, shard)}
    rows = sum(stop - start for _, todo in passes.values() for start, stop in map(siblings.index.bounds, todo))
    run = cluster.run_here if in_process else cluster.run_on_dask
    with progress(f"make shards of {places.shown(path)} again", rows, "images") as bar:
        for job, (planned, todo) in passes.items():
            for result in run(job, dict(sorted(todo.items())), workers or planned, scheduler):
                left += [f"{name} shard {result['shard']}: {why}" for name, why in result["left"].items()]
                bar.advance(result["rows"])
    upkeep.seal(path)
    return left


def _whole(siblings: Siblings, wanted: Shards) -> Shards:
    found: Shards = {}
    for name in siblings.names:
        folder = name.rpartition("/")[0]
        together = {n for n in wanted if n == name or folder != "pixels" and n.rpartition("/")[0] == folder}
        shards = set().union(*(wanted[n] for n in together))
        if shards:
            found[name] = wanted.get(name, set()) | shards & siblings.records(name).keys()
    return found


def repair(path: Path, images: Path | None = None, **how: Any) -> tuple[list[str], list[str]]:
    """Mends what `audit.verify` finds. Returns what was wrong, and what of it still is, one line each."""
    with owner(path):
        mended = audit.mend(path)
        adopted = adopt(path)
        found, bad = audit.check(path)
        if adopted:
            upkeep.seal(path)
        mended = [line for line in mended if line not in found] + adopted
        if not bad:
            return mended, found
        left = redo(path, bad, images, **how)
        still, _ = audit.check(path, only=bad)
    return [*mended, *found], [*still, *left]


def retry(path: Path, images: Path | None = None, **how: Any) -> dict[str, int]:
    """Makes the shards again in which a dead letter can be used now, or crashed a process and may not do so again.

    Rows that were dead at planning, or whose picture has changed since, stay dead: a row is fixed by its sha256.
    Returns how many dead rows there were, how many were tried and how many dead letters are left. Raises StoreError
    where a shard could not be made again.
    """
    with owner(path):
        opened, left = FeatureStore(path), []
        planned = {letter["row"] for letter in opened.index.dead()}
        letters: dict[str, dict[int, str]] = {}
        for name in opened.names():
            records = committed(path, name).values()
            letters[name] = {d["row"]: d["reason"] for r in records for d in r["dead"] if d["row"] not in planned}
        usable = _usable(path, opened.index, letters, images)
        encode.forget_crashers(path, usable)
        rows = opened.index.shard_rows
        wanted = {
            name: shards for name, dead in letters.items() if (shards := {row // rows for row in usable & set(dead)})
        }
        if wanted:
            left = redo(path, wanted, images, **how)
    if left:
        raise StoreError(f"{path}: {len(left)} shards are left as they were; the first: {left[0]}.")
    looked = set().union(*letters.values())
    return {"looked at": len(looked), "tried": len(usable), "dead": len(describe(path)["dead"])}


def _usable(path: Path, index: Index, letters: dict[str, dict[int, str]], images: Path | None) -> set[int]:
    """The dead rows whose picture can be read and decoded, or is only known to crash a process."""
    usable: set[int] = set()
    todo: dict[tuple[int, Path, int], None] = {}
    for name, dead in letters.items():
        if dead:
            settings, root = provenance.how(path, name, images)
            usable |= {row for row, reason in dead.items() if reason == encode.CRASHES}
            todo |= dict.fromkeys((row, root, settings.corpus.max_image_pixels) for row in dead)

    def works(record: dict, root: Path, most: int) -> bool:
        try:
            decode(encode.planned_image(root, record), most)
            return True
        except (BadImage, OSError):
            return False

    tasks = sorted((row, root, most) for row, root, most in todo if row not in usable)
    with progress("look at dead letters", len(tasks), "images") as bar, ThreadPoolExecutor(sources.READERS) as pool:
        for start in range(0, len(tasks), 64):
            part = tasks[start : start + 64]
            shards = {row // index.shard_rows for row, _, _ in part}
            records = {r["row"]: r for shard in shards for r in index.shard(shard)}
            found = pool.map(lambda t, records=records: works(records[t[0]], *t[1:]), part)
            usable |= {row for (row, _, _), good in zip(part, found, strict=True) if good}
            bar.advance(len(part))
    return usable
