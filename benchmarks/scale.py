"""A store of 14 million images: opening it, the first batch of 1,680 pairs, and memory over an epoch's order.

Index, captions, commit records and shard files of three arrays are real in number (27,344 shards each); the shards are
sparse files in which only the rows that are read here were written. A row is as small as the tiny models', so that the
figures are of what grows with the corpus; a batch of the paper's sizes adds its own bytes. The store takes about 3 GB
of disk and is removed. SCALE_IMAGES=100000 makes a smaller one.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from xformer.console import say, table

IMAGES = int(os.environ.get("SCALE_IMAGES", 14_000_000))
SHARD_ROWS, BATCH, DRAWN = 512, 1680, 8  # batches that are read, spread over the epoch
VIEW = {"view": 0, "crop": "resize"}
ARRAYS = {
    "clip/5/tokens": ((17, 96), "float16", VIEW),
    "mae/draw-0/tokens": ((17, 96), "float16", VIEW | {"mask_ratio": 0.75, "draw": 0, "mask_seed": 0}),
    "mae/draw-0/kept": ((8,), "uint8", VIEW | {"mask_ratio": 0.75, "draw": 0, "mask_seed": 0}),
}
OPEN = """
import json, sys, time
from pathlib import Path
from typing import Any
import benchmarks.scale as scale
from xformer.data import Cache, Pairs
from xformer.order import Schedule
from xformer.settings import load_settings
settings = load_settings(overrides=["store.shard_rows=512", "mae.draws=1", "clip.tokens=all"])
tokenizer, trainer = None, sys.argv[2] == "trainer"
if trainer:
    from xformer.model import Batch
    from xformer.text import TextTokenizer
    tokenizer = TextTokenizer(settings.qformer.text, settings.qformer.max_text, settings.qformer.max_words)
found = {"imports": scale.peak()}
began = time.perf_counter()
pairs = Pairs([Cache(Path(sys.argv[1]), settings, "xformer", pixels=False)], "train", tokenizer, settings)
schedule = Schedule(len(pairs), scale.BATCH, 2, 0, settings.seed)
draw = pairs.batch if trainer else pairs.read
found["open"] = time.perf_counter() - began
order = schedule.order(0)
draw(schedule.numbers(order, 0, 1)[0], 0)
found |= {"first batch": time.perf_counter() - began, "peak": [scale.peak()]}
for epoch in (0, 1):
    order = None
    order = schedule.order(epoch)
    for i in range(1, scale.DRAWN) if epoch == 0 else ():
        draw(schedule.numbers(order, schedule.per_epoch * i // scale.DRAWN, 1)[0], 0)
        found["peak"].append(scale.peak())
found["peak"].append(scale.peak())
print(json.dumps(found))
"""


def peak() -> float:
    """Peak resident memory of this process, MiB, with the pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def scale() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        store, began = Path(folder) / "s.zarr", time.perf_counter()
        write_store(store)
        made = time.perf_counter() - began
        disk = sum(int(line.split()[0]) for line in _du(store)) / 1e6
        found = {name: opened(store, name) for name in ("reader", "trainer")}
    rows = {
        "opened (s)": lambda f: f["open"], "first batch drawn (s)": lambda f: f["first batch"],
        "peak after imports (MiB)": lambda f: f["imports"], "peak after the first batch (MiB)": lambda f: f["peak"][0],
        "peak after the epoch (MiB)": lambda f: f["peak"][-2],
        "peak with the next epoch's order (MiB)": lambda f: f["peak"][-1],
    }  # fmt: skip
    report: dict = {"images": IMAGES, "shards of each array": -(-IMAGES // SHARD_ROWS)}
    report |= {"store made (s)": made, "disk (GB)": disk}
    report |= {who: {name: value(found[who]) for name, value in rows.items()} for who in found}
    table(f"a store of {IMAGES:,} images", ("", "value"), [(k, v) for k, v in report.items() if k not in found])
    table(
        f"opened by a reader (arrays and captions) and by a trainer (tensors and tokens), {BATCH:,} pairs a batch",
        ("", *found),
        [(name, *(f"{report[who][name]:.2f}" for who in found)) for name in rows],
    )
    return report


def opened(store: Path, who: str) -> dict:
    """Opens the store in a process of its own."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(store), who], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _du(path: Path) -> list[str]:
    return subprocess.run(["du", "-sk", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()


def write_store(store: Path) -> None:
    from pipeline import commits
    from pipeline.index import Index
    from pipeline.store import create_array, create_group, fingerprint, shard_bytes, shard_file

    create_group(store)
    write_index(store / "index")
    index = Index(store / "index")
    say(f"{index.count:,} rows planned; making {len(ARRAYS)} x {index.shards:,} shards")
    wanted = rows_read(index.count)
    by_shard = np.split(wanted, np.searchsorted(wanted, np.arange(1, index.shards) * SHARD_ROWS))
    for name, (shape, dtype, usage) in ARRAYS.items():
        create_array(store, name, index, shape, dtype, {"scale": 1}, usage)
        whole = bytes(shard_bytes(np.ones((SHARD_ROWS, *shape), dtype), SHARD_ROWS))
        rest = bytes(shard_bytes(np.ones((index.count - (index.shards - 1) * SHARD_ROWS, *shape), dtype), SHARD_ROWS))
        size, footer, records = (len(whole) - SHARD_ROWS * 16 - 4) // SHARD_ROWS, SHARD_ROWS * 16 + 4, {}
        for shard in range(index.shards):
            content, file = whole if shard < index.shards - 1 else rest, shard_file(store, name, shard, 1 + len(shape))
            file.parent.mkdir(parents=True)
            handle = os.open(file, os.O_CREAT | os.O_WRONLY)
            os.ftruncate(handle, len(content))
            os.pwrite(handle, content[-footer:], len(content) - footer)
            for row in by_shard[shard].tolist():
                os.pwrite(handle, content[:size], row % SHARD_ROWS * size)
            os.close(handle)
            records[shard] = {
                "shard": shard, "rows": list(index.bounds(shard)), "bytes": len(content), "seconds": 1.0, "dead": [],
                "ids_sha256": hashlib.sha256(f"{shard}".encode()).hexdigest(),
                "sha256": hashlib.sha256(f"{name} {shard}".encode()).hexdigest(),
                "fingerprint": fingerprint({"scale": 1}),
            }  # fmt: skip
        commits._write(store, name, records)


def rows_read(count: int) -> np.ndarray:
    """The rows that the benchmark will read, sorted: the order is a pure function of the seed. Pair i is row i here."""
    from xformer.order import Schedule
    from xformer.settings import load_settings

    schedule = Schedule(count, BATCH, 2, 0, load_settings().seed)
    order = schedule.order(0)
    steps = [schedule.per_epoch * i // DRAWN for i in range(DRAWN)]
    return np.unique(np.concatenate([order[step * BATCH : (step + 1) * BATCH] for step in steps]))


def write_index(folder: Path) -> None:
    """What planning writes for images with one caption each, without the images."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from pipeline.index import CAPTIONS, HASHES, ROWS
    from pipeline.write_index import CAPTION_BATCH
    from xformer import publish

    joined: Any = pc.binary_join_element_wise  # type: ignore[attr-defined]
    folder.mkdir(parents=True)
    hashes = np.zeros((HASHES, 32), np.uint8)
    rows_file = pq.ParquetWriter(folder / "rows.parquet", ROWS, compression="zstd")
    captions_file = pa.ipc.new_file(str(folder / "captions.arrow"), CAPTIONS)
    for start in range(0, IMAGES, CAPTION_BATCH):
        numbers = np.arange(start, min(IMAGES, start + CAPTION_BATCH))
        count, ids = len(numbers), pc.cast(pa.array(numbers), pa.string())
        digests = np.zeros((count, 32), np.uint8)
        digests[:, :8] = numbers[:, None].view(np.uint8)
        columns = {
            "row": numbers, "id": ids, "source": ["table"] * count, "size": np.full(count, 100_000),
            "location": joined("images/", ids, ".jpg", ""),
            "sha256": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, pa.py_buffer(digests)]),
            "captions": np.ones(count, np.int32), "split": ["train"] * count, "status": ["ok"] * count,
            "reason": [""] * count,
        }  # fmt: skip
        first = start % HASHES
        hashes[first : first + count] = digests
        if first + count == HASHES or start + count == IMAGES:
            publish.write_bytes(folder / f"c/{start // HASHES}/0", hashes.tobytes())
        rows_file.write_table(pa.table(columns, ROWS))
        texts = joined("a photo of the place ", ids, " at dusk", "")
        captions_file.write_table(pa.table({"row": numbers, "text": texts}, CAPTIONS))
    rows_file.close()
    captions_file.close()
    description = {"corpus": {"kind": "table"}, "shard_rows": SHARD_ROWS, "images": IMAGES, "captions": IMAGES}
    publish.write_json(folder / "index.json", description | {"dead": 0, "train": IMAGES, "val": 0})
