"""Commit records made again from the shards they were of, without pictures and without an encoder.

A shard says nearly all that its record said: every row has its own crc32c, the ids are in the index, the fingerprint is
the array's, and a dead row holds the fill value, which no alive row of floats or mask bits does. Where zeros may be alive
(pixels, int8 tokens) the records of the arrays that were made beside it say which rows died; where they do not agree,
nothing is adopted.
"""

from functools import cache
from pathlib import Path

import numpy as np
from awscrt.checksums import crc32c

from pipeline import commits, encode, places
from pipeline.index import Index
from pipeline.reader import array_metadata, refuse_mixed, shard_file
from pipeline.store import array_names, shard_bytes
from xformer.errors import StoreError

LOST = "recorded dead; its reason was lost"


class Siblings:
    """The readable commit records of all arrays, each read when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.index, self.names = path, Index(path / "index"), array_names(path)
        self.records = cache(self._records)

    def _records(self, name: str) -> dict[int, dict]:
        damaged: list[Path] = []
        try:
            found = commits.committed(self.path, name, damaged)
        except StoreError:
            return {}
        gone = {int(file.stem) for file in damaged}
        return {shard: record for shard, record in found.items() if shard not in gone}

    def dead(self, name: str, shard: int) -> list[set[int]]:
        """The dead rows of a shard, as each array says that was made beside this one: int8 tokens' own scales, or
        whatever else is of the same encoder, or else of another one."""
        folder = name.rpartition("/")[0]
        scale, kind = f"{folder}/scale", name.split("/")[0].replace("pixels", "mae")
        beside = {scale} if scale in self.names and name != scale else {n for n in self.names if n.startswith(kind)}
        for names in (beside - {name}, {*self.names} - beside - {name}):
            found = [record for n in sorted(names) if (record := self.records(n).get(shard))]
            if found:
                return [{letter["row"] for letter in record["dead"]} for record in found]
        return []

    def letters(self, shard: int, rows: set[int]) -> list[dict]:
        """Dead letters of these rows, with the reason that planning, a crash or any array's record gives."""
        reasons = encode.crashed(self.path)
        for name in self.names:
            reasons |= {d["row"]: d["reason"] for d in self.records(name).get(shard, {}).get("dead", [])}
        planned = [r for r in self.index.shard(shard) if r["row"] in rows]
        return [
            {
                "row": r["row"],
                "id": r["id"],
                "source": r["source"],
                "reason": r["reason"] or reasons.get(r["row"], LOST),
            }
            for r in planned
        ]

    def known_dead(self, name: str, shard: int) -> list[dict]:
        """Dead letters of a shard whose own record is lost: of planning, of crashes, and of all arrays beside it, but of
        no row that is there and alive."""
        start, stop = self.index.bounds(shard)
        rows = {row for row in encode.crashed(self.path) if start <= row < stop}
        rows |= {r["row"] for r in self.index.shard(shard) if r["status"] == "dead"}
        beside = self.dead(name, shard)
        rows |= set.intersection(*beside) if beside else set()
        return self.letters(shard, rows - self._alive(name, shard))

    def _alive(self, name: str, shard: int) -> set[int]:
        """The rows of a shard, which may be damaged, that pass their own checksum and hold something."""
        shape, dtype, _ = array_metadata(self.path, name)
        start, stop = self.index.bounds(shard)
        try:
            content = places.read(shard_file(self.path, name, shard, len(shape)))
        except OSError:
            return set()
        return {start + i for i, row in intact_rows(content, (stop - start, *shape[1:]), dtype).items() if _holds(row)}


def adopt(path: Path) -> list[str]:
    """Makes the commit records again that are damaged, or that an array has lost altogether, of every shard that is
    whole. Returns what was done, one line each; what could not be adopted keeps its damaged record.

    Raises StoreError where the index is another than the arrays were made over."""
    siblings, lines = Siblings(path), []
    for name in siblings.names:
        refuse_mixed(path, name, siblings.index)
    for name in sorted(siblings.names, key=lambda name: (not _told_by_itself(path, name), name)):
        damaged, lost = commits.damaged(path, name), not commits.any_record(path, name)
        shards = _written(path, name) if lost else damaged
        adopted = []
        for shard in sorted(shards):
            if shard < siblings.index.shards and (record := _record(path, name, shard, siblings)):
                commits.publish(path, name, record, exclusive=False)
                siblings.records(name)[shard] = record
                adopted.append(shard)
        if lost and adopted:
            count = f"{len(adopted)} of {siblings.index.shards} shards are whole"
            lines.append(f"{places.shown(path / name)}: its commit records were gone; {count} and have one again")
        elif adopted:
            files = (places.shown(commits.commit_file(path, name, shard)) for shard in adopted)
            lines += [f"{file}: damaged commit record; made again from its shard, which is whole" for file in files]
    return lines


def _written(path: Path, name: str) -> set[int]:
    files = places.walk(path / name / "c")
    return {int(part) for file in files if (part := file.relative_to(path / name / "c").parts[0]).isdigit()}


def _told_by_itself(path: Path, name: str) -> bool:
    """Whether an array's fill value says that a row is dead: NaN, or no mask bit at all."""
    if name.endswith("/kept"):
        return True
    try:
        return array_metadata(path, name)[1].kind == "f"
    except (StoreError, FileNotFoundError):
        return False


def _record(path: Path, name: str, shard: int, siblings: Siblings) -> dict | None:
    """The commit record of a whole shard; None where it is not whole, or its dead rows cannot be told."""
    try:
        shape, dtype, about = array_metadata(path, name)
        content = places.read(shard_file(path, name, shard, len(shape)))
    except (StoreError, OSError):
        return None
    index, (start, stop) = siblings.index, siblings.index.bounds(shard)
    block = rows_of(content, (stop - start, *shape[1:]), dtype, index.shard_rows)
    if block is None:
        return None
    records = index.shard(shard)
    planned = {r["row"] for r in records if r["status"] == "dead"}
    dead = {start + i for i, row in enumerate(block) if not _holds(row)}
    if planned - dead:
        return None
    if not _told_by_itself(path, name) and (unsure := dead - planned):
        said = [rows & unsure for rows in siblings.dead(name, shard)]
        if not said or any(rows != said[0] for rows in said):
            return None
        dead = planned | said[0]
    letters = siblings.letters(shard, dead)
    bounds, ids = (start, stop), [record["id"] for record in records]
    return commits.compose(shard, bounds, ids, content, about["fingerprint"], 0.0, letters)


def _holds(row: np.ndarray) -> bool:
    """Whether a row holds anything else than the fill value."""
    return bool(np.any(~np.isnan(row) if row.dtype.kind == "f" else row))


def intact_rows(content: bytes, shape: tuple[int, ...], dtype: np.dtype) -> dict[int, np.ndarray]:
    """The rows of a shard file, which may be damaged, that pass their own crc32c, by their place in the shard."""
    size, found = int(np.prod(shape[1:])) * dtype.itemsize, {}
    for i in range(shape[0]):
        row = content[i * (size + 4) : (i + 1) * (size + 4)]
        if len(row) == size + 4 and crc32c(row[:-4]) == int.from_bytes(row[-4:], "little"):
            found[i] = np.frombuffer(row, dtype, size // dtype.itemsize).reshape(shape[1:])
    return found


def rows_of(content: bytes, shape: tuple[int, ...], dtype: np.dtype, shard_rows: int) -> np.ndarray | None:
    """The rows of a shard file; None unless every checksum is right and it holds all of them and nothing else."""
    size = int(np.prod(shape[1:])) * dtype.itemsize
    body = shape[0] * (size + 4)
    if len(content) != body + shard_rows * 16 + 4:
        return None
    rows = np.frombuffer(content, np.uint8, body).reshape(shape[0], size + 4)[:, :size]
    block = np.ascontiguousarray(rows).view(dtype).reshape(shape)
    return block if shard_bytes(block, shard_rows) == content else None
