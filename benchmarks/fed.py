"""A training step fed by the reader against the same step on tensors that are already in memory.

Both forward, backward and update. Blocks of steps alternate, fed and then on the very batches that were fed, and the ratio
is of neighbouring blocks. The first steps of a block do not count: they use up what the reader had ready, so that from then
on it must keep pace with one batch per step. While the others run there is no reader.
"""

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from benchmarks.step import BEGIN, VOCABULARY
from benchmarks.step import build as build_wide
from pipeline.captioned import Row
from pipeline.corpora import Corpus
from pipeline.index import Index
from pipeline.store import SCHEMA, create_array, write_shard
from pipeline.write_index import write_index
from xformer.console import table
from xformer.data import Cache, Pairs
from xformer.model import Stage1, build_stage1
from xformer.optimiser import make_optimizer
from xformer.order import Schedule
from xformer.reading import stream
from xformer.settings import Settings, load_settings
from xformer.text import TextTokenizer

ROWS, SHARD, COUNTED = 192, 32, 6  # steps of a block that count
CAPTION = "a man in a red shirt rides a brown horse along the beach"  # as long as COCO's captions are


def make_store(path: Path, settings: Settings) -> None:
    """Random features of the settings' sizes, written as an extraction writes them; the pictures are empty of meaning."""
    pictures = path.parent / "pictures"
    pictures.mkdir()
    names = [f"{i}.png" for i in range(ROWS)]
    for name in names:
        (pictures / name).write_bytes(name.encode())
    rows = [Row(name, name, (CAPTION,), "train") for name in names]
    zarr.open_group(path, mode="a", zarr_format=3, attributes={"xformer_schema": SCHEMA})
    write_index(path / "index", Corpus("made up", pictures, pictures, "0", lambda: iter(rows)), SHARD, 0.0, None)
    index, draw = Index(path / "index"), np.random.default_rng(0)
    side, patches = settings.image_size, (settings.image_size // settings.mae.patch) ** 2
    clip, cells = settings.clip, (side // (14 if side == 224 else 16)) ** 2
    small = clip.only_global(clip.layers[0])
    tokens = 1 + (int(clip.kwargs["reg_tokens"]) if small else cells)
    visible, usage = patches // 4, {"view": 0, "crop": "resize", "mask_ratio": 0.75, "draw": 0}
    usage["mask_seed"] = settings.mae.mask_seed
    arrays = {
        f"clip/{clip.layers[0]}/tokens": ((tokens, clip.width), "float16"),
        "mae/draw-0/tokens": ((visible + 1, settings.mae.width), "float16"),
        "mae/draw-0/kept": ((patches // 8,), "uint8"),
        "pixels/view-0": ((3, side, side), "uint8"),
    }
    kept = np.packbits(np.arange(patches) < visible)
    for name, (shape, dtype) in arrays.items():
        create_array(path, name, index, shape, dtype, {"tokens": "global" if small else "all"}, usage)
        for shard in range(index.shards):
            if name.endswith("kept"):
                block = np.tile(kept, (SHARD, 1))
            elif dtype == "uint8":
                block = draw.integers(0, 256, (SHARD, *shape), np.uint8)
            else:
                block = draw.standard_normal((SHARD, *shape), np.float32).astype(np.float16)
            start, stop = index.bounds(shard)
            write_shard(path, name, index, shard, block, names[start:stop], [], 0.0)


def compare(settings: Settings, stage1: Stage1, batch: int, blocks: int, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.zarr"
        make_store(store, settings)
        tokenizer = TextTokenizer("embedded:text", settings.qformer.max_text, settings.qformer.max_words)
        pairs = Pairs([Cache(store, settings, "xformer", pixels=True)], "train", tokenizer, settings)
        skipped = settings.data.ahead + 2
        schedule = Schedule(len(pairs), batch, 10**6, (blocks + 1) * (skipped + COUNTED), 0)
        stage1.to(device).train()
        optimizer = make_optimizer(stage1, settings.stage1)

        def step(given: Any) -> float:
            optimizer.zero_grad()
            losses, _ = stage1(given.to(device), True, torch.Generator().manual_seed(0))
            total = torch.stack(list(losses.values())).sum()
            total.backward()
            optimizer.step()
            return float(total.detach())

        def block(batches: Iterator[Any]) -> float:
            for _ in range(skipped):
                step(next(batches))
            began = time.perf_counter()
            for _ in range(COUNTED):
                step(next(batches))
            return time.perf_counter() - began

        def batches_from(start: int) -> Iterator[Any]:
            given = settings.data
            for read in stream(pairs, schedule, start, 0, 1, 1, threads=given.threads, ahead=given.ahead):
                yield read.batch

        def copied(batch: Any) -> Any:
            held = {k: None if v is None else v.clone().to(device) for k, v in vars(batch).items()}
            return dataclasses.replace(batch, **held)

        seconds: dict[str, list[float]] = {"fed": [], "in memory": []}
        for number in range(1 + blocks):  # the first warms everything up
            first, many = number * (skipped + COUNTED), skipped + COUNTED
            held = [copied(batch) for batch in itertools.islice(batches_from(first), many)]
            took = block(batches_from(first)), block(iter(held))
            if number:
                for name, value in zip(seconds, took, strict=True):
                    seconds[name].append(value / COUNTED)
    ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
    return {
        "batch": batch,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }


def fed() -> dict[str, Any]:
    """The tiny preset, and the paper's widths at a third of their depth; on a GPU too, where there is one."""
    tiny, wide = load_settings("tiny"), load_settings("paper", overrides=["qformer.dropout=0", "data.threads=2"])
    words = TextTokenizer("embedded:text", tiny.qformer.max_text, tiny.qformer.max_words)
    assert words.vocabulary <= VOCABULARY and words.begin < BEGIN
    torch.manual_seed(0)
    small = build_stage1(tiny, "xformer", words.vocabulary, words.begin)
    cpu = torch.device("cpu")
    found = {
        "tiny, CPU": compare(tiny, small, tiny.stage1.batch, 7, cpu),
        "BERT-base widths, CPU": compare(wide, build_wide(), 4, 5, cpu),
    }
    if torch.cuda.is_available():
        found["BERT-base widths, GPU"] = compare(wide, build_wide(), 100, 7, torch.device("cuda"))
    header = ("", "batch", "fed (s)", "in memory (s)", "ratio, median of blocks", "lowest", "highest")
    rows = [
        (name, r["batch"], *r["seconds"].values(), r["ratio"], r["lowest"], r["highest"]) for name, r in found.items()
    ]
    table("a stage-1 step fed by the reader : the same step on tensors in memory", header, rows)
    return found
